"""docker/: what can be said of it without Docker, and its services' commands run for real."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import fabricated
import load
import pytest
from operating import (
    PROJECT,
    ask,
    belonging,
    ended,
    environment,
    free_port,
    kill_left,
    neft,
    start_run,
    until,
)  # fmt: skip
from ruamel.yaml import YAML
from stack import COMPOSE, Stack, compose, image_environment, postgresql, running

from neft_core import databases
from neft_core.errors import NeftError
from neft_core.mlflow_store import open_store
from neft_core.workspace import Workspace, init_dvc

FILLED = {
    "POSTGRES_PASSWORD": "a",
    "S3_ACCESS_KEY": "b",
    "S3_SECRET_KEY": "c",
    "PREFECT_AUTH": "d:e",
    "MLFLOW_PASSWORD": "f",
    "MLFLOW_KEY": "g",
}


def dockerfile() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", (PROJECT / "docker/Dockerfile").read_text(), flags=re.M)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.strip().split(None, 1)) for line in lines if line.strip()]


def test_images_are_pinned_and_nothing_runs_as_root():
    steps = dockerfile()
    images = [rest.split()[0] for step, rest in steps if step == "FROM"]
    assert images == ["python:${PYTHON}", "libraries", "python:${PYTHON}"]
    assert dict(steps)["USER"] == "neft"
    assert dict(steps)["HEALTHCHECK"].endswith('timeout=5)"]')
    (python,) = [rest for step, rest in steps if step == "ARG" and rest.startswith("PYTHON")]
    assert re.fullmatch(r"PYTHON=3\.11\.\d+-slim-bookworm", python)
    torch = re.search(r'"(torch==[^"]+)"', (PROJECT / "pyproject.toml").read_text())[1]
    assert dict.fromkeys(re.findall(r"torch==[\d.]+", str(steps))) == {torch: None}
    for name, service in compose(FILLED).items():
        image, _, tag = service["image"].partition(":")
        assert tag or image == "neft", name


def test_what_the_dockerfile_copies_is_let_through():
    ignored = (PROJECT / ".dockerignore").read_text().split()
    copied = [part for step, rest in dockerfile() if step == "COPY" for part in rest.split()[:-1]]
    for path in copied:
        if not path.startswith(("--from", "/")):
            assert (PROJECT / path).exists()
            assert f"!{path}" in ignored
    # The package has links to files beside it, which must be there where it is installed from.
    for link in PROJECT.glob("neft_core/**/*"):
        if link.is_symlink():
            target = link.resolve().relative_to(PROJECT)
            assert {str(target), *map(str, target.parents)} & set(copied), link


def test_secrets_have_no_default():
    for name in FILLED:
        with pytest.raises(ValueError, match=f"{name}: set it in docker/.env"):
            compose({**FILLED, name: ""})
    example = (PROJECT / "docker/.env.example").read_text()
    assert dict(re.findall(r"^(\w+)=(.*)$", example, re.M)) | FILLED == {
        **FILLED, "DEVICE": "cpu", "PREFECT_PORT": "4200",
        "MLFLOW_PORT": "5000", "S3_PORT": "9000",
    }  # fmt: skip
    used = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text())) - {"NEFT_IMAGE"}
    assert used == set(re.findall(r"^(\w+)=", example, re.M))


def test_what_services_need_is_there_and_ports_are_on_loopback():
    found = YAML(typ="safe").load(COMPOSE.read_text())
    services = found["services"]
    named = [v.split(":")[0] for s in services.values() for v in s.get("volumes", [])]
    assert {name for name in named if not name.startswith(".")} == set(found["volumes"])
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)
        for needed, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert services[needed].get("healthcheck", {}).get("test"), needed
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert "MLFLOW_BACKEND_STORE_URI" not in services["worker"]["environment"]
    # The pool beside them has Prefect's login and the engine's socket, and nothing else.
    pool = YAML(typ="safe").load((PROJECT / "docker/pool.yaml").read_text())["services"]
    assert set(pool) == {"pool"}
    assert set(pool["pool"]["depends_on"]) <= set(services)
    assert set(pool["pool"]["environment"]) == {"PREFECT_API_URL", "PREFECT_API_AUTH_STRING"}
    assert [place.rpartition(":")[2] for place in pool["pool"]["volumes"]] == [
        "/var/run/docker.sock"
    ]
    assert "ports" not in pool["pool"]


def test_a_real_parser_takes_the_compose_file(tmp_path):
    """Debian's docker-compose, where it is installed."""
    import shutil

    if not shutil.which("docker-compose"):
        pytest.skip("no docker-compose")
    env, pool = tmp_path / ".env", COMPOSE.with_name("pool.yaml")
    env.write_text("\n".join(f"{k}={v}" for k, v in FILLED.items()))
    line = ["docker-compose", "--env-file", env, "-f", COMPOSE]
    done = subprocess.run([*line, "config", "-q"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    both = [*line, "-f", pool, "config", "-q"]
    done = subprocess.run(both, capture_output=True, text=True)
    assert "set it in docker/.env" in done.stderr  # DOCKER_GROUP
    with env.open("a") as file:
        file.write("\nDOCKER_GROUP=99\n")
    done = subprocess.run(both, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


KEPT = """
import boto3, json
store = boto3.client("s3")
pages = store.get_paginator("list_objects_v2").paginate(Bucket="neft")
keys = [found["Key"] for page in pages for found in page["Contents"]]
body = lambda key: store.get_object(Bucket="neft", Key=key)["Body"].read().decode("latin-1")
print(json.dumps({key: body(key) for key in keys}))
"""
"""Prints every object of the S3 store."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    if postgresql() is None:
        pytest.skip("no PostgreSQL (Debian: apt-get install postgresql)")
    pytest.importorskip("moto")
    with running(tmp_path_factory.mktemp("stack"), workers=2) as found:
        yield found
    assert found.processes() == []


@pytest.mark.slow
@pytest.mark.integration
def test_a_load_with_a_killed_worker_and_a_killed_mlflow(stack: Stack):
    ws = load.workspace(stack)
    for found in ask(stack.api, "/automations/filter", {}):
        if found["name"] == "neft-silent-runs":  # a test can't wait as long; heartbeats come in 30
            found["trigger"]["within"] = 75
            kept = ("name", "description", "enabled", "tags", "trigger", "actions")
            body = {key: found[key] for key in kept}
            ask(stack.api, f"/automations/{found['id']}", body, "PUT")
    found = load.load(stack, ws, 3, 600)
    assert found["messages"] == ["no sign of life in 100 s: its process was killed"]
    assert set(found["first"]) == {"COMPLETED", "CRASHED"} or found["first"] == {"CRASHED": 3}
    assert found["second"] == {"COMPLETED": 3}
    # Two seeds and an execution of each.
    assert found["mlflow runs"] == found["of these by key"] == 9, found
    assert found["mlflow status"] == {"FINISHED": 9}
    assert (found["workspaces"], found["not up to date"], found["stages left over"]) == (3, [], 0)

    # Artifacts went through MLflow's server to the S3 store, and come back the same way.
    kept = json.loads(stack.run("bucket", sys.executable, "-c", KEPT))
    assert any(place.endswith("adapter/adapter_model.safetensors") for place in kept)

    # And every byte of them: which object is which run's, their paths in the store don't tell.
    adapters = [text for place, text in kept.items() if place.endswith(".safetensors")]
    files = list(ws.root.rglob("work/train/**/*.safetensors"))
    assert {path.read_bytes().decode("latin-1") for path in files} == set(adapters)

    # Credentials: in what servers tell, what they keep, and what lies in files.
    told = [ask(stack.api, "/artifacts/filter", {})]
    while told[-1]:  # 200 lines at a time
        told.append(ask(stack.api, "/logs/filter", {"limit": 200, "offset": 200 * len(told) - 200}))
    assert len(told) > 3
    told += [ask(f"{stack.tracking}/api/2.0/mlflow", "/runs/search", {"experiment_ids": ["1"]})]
    texts = {str(number): str(answer) for number, answer in enumerate(told)} | kept
    texts |= {name: stack.dump(name) for name in ("prefect", "mlflow")}
    texts |= {
        str(path): path.read_bytes().decode("utf-8", "replace")
        for path in stack.folder.rglob("*")
        if path.is_file() and path.stat().st_size < 10**7
    }
    assert len(texts) > 100
    for name, secret in stack.secrets.items():
        word = secret.rpartition(":")[2]  # a password without its user too
        assert not [place for place, text in texts.items() if word in text], name
    for pid in stack.processes():
        line = Path(f"/proc/{pid}/cmdline").read_text()
        assert not [name for name, secret in stack.secrets.items() if secret in line]
    worker = stack.environment("worker")
    assert stack.secrets["POSTGRES_PASSWORD"] not in str(worker)


@pytest.mark.integration
def test_what_a_database_refuses_is_told_without_its_password(stack: Stack):
    """And one that both servers would use; what they use here is taken."""
    names = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "MLFLOW_BACKEND_STORE_URI")
    environment = stack.environment("prefect") | stack.environment("mlflow")
    right = {name: environment[name] for name in names}
    databases.check(right)
    for name in names:
        password = stack.secrets["POSTGRES_PASSWORD"]
        for old, new, told in (
            (password, "other", 'password authentication failed for user "neft"'),
            (right[name].rpartition("/")[2], "nowhere", 'database "nowhere" does not exist'),
        ):
            with pytest.raises(NeftError, match=told) as fault:
                databases.check(right | {name: right[name].replace(old, new)})
            assert str(fault.value).startswith(f"{name}: database ")
            assert password not in str(fault.value)
            assert "other" not in str(fault.value)
    how = "ENCODING 'SQL_ASCII' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
    stack.sql(f"CREATE DATABASE narrow {how}")
    for name in names:
        narrow = right[name].rpartition("/")[0] + "/narrow"
        with pytest.raises(NeftError, match=r"narrow on .*: its encoding is SQL_ASCII; make it"):
            databases.check({name: narrow})
    both = right[names[0]].replace("asyncpg", "psycopg2")
    with pytest.raises(NeftError, match=f"^{names[1]}: is prefect's database too; give each one"):
        databases.check(right | {names[1]: both})


@pytest.mark.slow
@pytest.mark.integration
def test_up_on_postgresql_with_passwords(stack: Stack, tmp_path):
    """`neft up` with databases and logins of its own: deployments, a run, its trainings, down."""
    env = environment(tmp_path) | {
        "PREFECT_SERVER_API_AUTH_STRING": "me:planted-a",
        "PREFECT_API_AUTH_STRING": "me:planted-a",
        "MLFLOW_AUTH_ADMIN_PASSWORD": "planted-b-password",
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": "planted-b-password",
    }
    for service, name in (
        ("prefect", "PREFECT_SERVER_DATABASE_CONNECTION_URL"),
        ("mlflow", "MLFLOW_BACKEND_STORE_URI"),
    ):
        stack.sql(f"CREATE DATABASE up_{service} ENCODING 'UTF8' TEMPLATE template0")
        env[name] = stack.environment(service)[name].rpartition("/")[0] + f"/up_{service}"
    fabricated.make(tmp_path / "ws")
    init_dvc(tmp_path / "ws")
    ports = ["--prefect-port", str(free_port()), "--mlflow-port", str(free_port())]
    try:
        told = neft(tmp_path / "ws", env, "up", *ports).stdout
        exported = told.rpartition("export ")[2].split()
        clients = dict(pair.split("=", 1) for pair in exported)
        api = clients["PREFECT_API_URL"].replace("://", "://me:planted-a@")
        tracking = clients["MLFLOW_TRACKING_URI"].replace("://", "://admin:planted-b-password@")
        paths = ("/flows/filter", "/api/2.0/mlflow/runs/search")
        for address, path in zip(clients.values(), paths, strict=True):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                ask(address, path, {"experiment_ids": ["1"]})
        # Another shell, which has no password, opens nothing.
        pid = json.loads((tmp_path / "state/servers.json").read_text())["pids"]["mlflow"]
        os.killpg(pid, signal.SIGKILL)
        other = {name: value for name, value in env.items() if "AUTH_ADMIN" not in name}
        told = neft(tmp_path / "ws", other, "up", *ports, status=2).stderr
        assert "MLFLOW_AUTH_ADMIN_PASSWORD: not set, and mlflow asked for it before" in told
        assert "mlflow: http" in neft(tmp_path / "ws", env, "up", *ports).stdout
        neft(tmp_path / "ws", env, "deploy")
        state = ended(api, start_run(api, "neft-pipeline/on-demand"))
        assert state["type"] == "COMPLETED", state["message"]
        found = ask(f"{tracking}/api/2.0/mlflow", "/runs/search", {"experiment_ids": ["1"]})
        assert len(found["runs"]) == 4  # three trainings, and the execution
        neft(tmp_path / "ws", env, "down")
        assert list(belonging(tmp_path)) == []
        for path in tmp_path.rglob("*"):
            if path.is_file():
                assert b"planted" not in path.read_bytes(), path
    finally:
        kill_left(tmp_path)


@pytest.mark.integration
def test_mlflow_answers_only_to_its_own_names(stack: Stack):
    until(lambda: stack.healthy("mlflow"))
    port, password = stack.ports["mlflow"], stack.secrets["MLFLOW_PASSWORD"]
    url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=1"
    login = f"Basic {base64.b64encode(f'admin:{password}'.encode()).decode()}"
    for host, allowed in ((f"mlflow:{port}", True), ("localhost:9", True), ("evil.org", False)):
        request = urllib.request.Request(url, headers={"Host": host, "Authorization": login})
        if allowed:
            assert urllib.request.urlopen(request, timeout=180).status == 200
        else:
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(request, timeout=180)


@pytest.mark.integration
def test_servers_ask_for_a_password(stack: Stack, tmp_path, monkeypatch):
    """And tell who asks without one nothing but that they are there."""
    until(lambda: stack.healthy("mlflow"))
    apis = {
        f"http://{{}}127.0.0.1:{stack.ports['prefect']}/api": "/flows/filter",
        f"http://{{}}127.0.0.1:{stack.ports['mlflow']}/api/2.0/mlflow": "/runs/search",
    }
    for api, path in apis.items():
        for login in ("", "admin:wrong@", "team:wrong@"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                ask(api.format(login), path, {"experiment_ids": ["1"]})
    host = stack.tracking.rpartition("@")[2]
    line = f"MLflow at http://{host}: refuses the login, or was given none; check MLFLOW_TRACKING_U"
    fabricated.make(tmp_path)
    for login in ("", "admin:wrong@"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{login}{host}")
        with pytest.raises(NeftError, match=f"^{re.escape(line)}"), open_store(Workspace(tmp_path)):
            raise AssertionError


def test_the_images_environment_is_read():
    found = image_environment()
    assert found["PREFECT_HOME"] == "/state/prefect"
    assert found["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
