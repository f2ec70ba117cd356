"""The code of a registered model: MLflow keeps this file and runs it when it loads the model."""

from mlflow.models import set_model

from neft_core.serving import Answering

set_model(Answering())
