-- Prefect and MLflow each keep their own table of migrations: one database for each.
CREATE DATABASE mlflow ENCODING 'UTF8' TEMPLATE template0;
