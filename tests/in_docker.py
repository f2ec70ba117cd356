"""The image and docker/compose.yaml on a Docker engine, as docs/operations.md says it.

`python tests/in_docker.py` builds the image (or takes `--image`), starts all services with a tiny
workspace, runs it as a process of the worker and as a container of its own, restarts the worker in
the middle of a run, loads the promoted model through MLflow's server, looks for every password in
all logs and in what both servers tell, and takes everything down. It prints what it saw, and ends
with an AssertionError where that isn't what should be.
"""

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conftest import tiny_workspace
from operating import PROJECT, ask, ended, free_port, start_run, until
from ruamel.yaml import YAML


class Services:
    """A project of Compose with settings of its own; every secret is new."""

    def __init__(self, folder: Path, image: str) -> None:
        self.name = f"neft-{secrets.token_hex(4)}"
        example = (PROJECT / "docker/.env.example").read_text()
        empty = re.findall(r"^(\w+)=$", example, re.M)
        self.secrets = {name: secrets.token_hex(12) for name in empty}
        self.secrets["PREFECT_AUTH"] = f"team:{secrets.token_hex(12)}"
        self.ports = {name: free_port() for name in ("PREFECT_PORT", "MLFLOW_PORT", "S3_PORT")}
        socket = Path(os.environ.get("DOCKER_HOST", "").removeprefix("unix://"))
        socket = socket if socket.is_socket() else Path("/var/run/docker.sock")
        more = {"DOCKER_SOCKET": socket, "DOCKER_GROUP": socket.stat().st_gid}
        settings = {**self.secrets, **self.ports, **more, "NEFT_IMAGE": image, "DEVICE": "cpu"}
        self.env = folder / "env"
        self.env.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        old = shutil.which("docker-compose")
        self.program = ["docker-compose"] if old else ["docker", "compose"]
        self.api = (
            f"http://{self.secrets['PREFECT_AUTH']}@127.0.0.1:{self.ports['PREFECT_PORT']}/api"
        )

    def compose(self, *argv: str, data: bytes | None = None) -> str:
        """What a command of Compose prints."""
        files = [f"--file={PROJECT}/docker/{name}.yaml" for name in ("compose", "pool")]
        line = [*self.program, "-p", self.name, f"--env-file={self.env}", *files, *argv]
        done = subprocess.run(line, input=data, capture_output=True, timeout=900)
        assert done.returncode == 0, (argv, (done.stdout + done.stderr).decode()[-3000:])
        return done.stdout.decode()

    def inside(self, *argv: str, data: bytes | None = None) -> str:
        """What a command prints in the worker's container."""
        return self.compose("exec", "-T", "worker", *argv, data=data)

    def ids(self, service: str) -> list[str]:
        """Containers of a service."""
        return self.compose("ps", "-q", service).split()

    def health(self, service: str) -> str:
        """What Docker says of a service's container."""
        (one,) = self.ids(service)
        return docker("inspect", "-f", "{{.State.Health.Status}}", one).strip()


def docker(*argv: str) -> str:
    """What a command of Docker prints."""
    return subprocess.run(
        ["docker", *argv], check=True, capture_output=True, text=True, timeout=120
    ).stdout


@contextlib.contextmanager
def up(folder: Path, image: str) -> Iterator[Services]:
    """All services, healthy; taken down with their volumes at the end, and nothing is left."""
    services = Services(folder, image)
    try:
        services.compose("up", "-d", "--no-build")
        for name in ("postgres", "prefect", "mlflow", "worker", "pool"):
            until(lambda name=name: services.health(name) == "healthy", 180)
        yield services
    finally:
        services.compose("down", "-v", "--timeout", "70")
    filters = ["--filter", f"name={services.name}"]
    for kind, all_of in (("container", ["-a"]), ("volume", []), ("network", [])):
        assert not docker(kind, "ls", "-q", *all_of, *filters), kind


def workspace(services: Services, folder: Path) -> None:
    """The tests' tiny workspace in the volume, and the usual deployments."""
    services.compose("run", "--rm", "worker", "neft", "init", "/workspace")
    tiny_workspace(folder / "tiny")
    kept = ["params.yaml", "data"]
    packed = subprocess.run(
        ["tar", "-C", folder / "tiny", "-c", *kept], check=True, capture_output=True
    ).stdout
    services.inside("tar", "--no-same-owner", "-x", "-C", "/workspace", data=packed)
    services.inside("neft", "deploy")


def pool(services: Services) -> dict[str, Any]:
    """What docs/operations.md has a deployment say for containers of its own."""
    found = (PROJECT / "docs/operations.md").read_text().split("# a container for each run\n")[1]
    text = found.split("```")[0].replace("docker_", f"{services.name}_")
    return YAML(typ="safe").load(text)["work_pool"]


def by_schedule(services: Services) -> None:
    """A deployment whose runs are containers, one a minute."""
    deployments = YAML(typ="safe").load((PROJECT / "prefect.yaml").read_text())
    nightly = deployments["deployments"][0]
    nightly |= {"name": "in-container", "work_pool": pool(services)}
    nightly["schedules"] = [{"cron": "* * * * *", "timezone": "UTC", "active": True}]
    deployments["deployments"] = [nightly]
    text = json.dumps(deployments).encode()
    services.inside("sh", "-c", "cat > /tmp/pool.yaml", data=text)
    home = "umask 77; mkdir -p /state/home/.mlflow; cat > /state/home/.mlflow/credentials"
    login = "[mlflow]\nmlflow_tracking_username = admin\nmlflow_tracking_password = "
    login += services.secrets["MLFLOW_PASSWORD"]
    services.inside("sh", "-c", home, data=login.encode())
    services.inside("neft", "deploy", "--file", "/tmp/pool.yaml")


def mlflow_runs(services: Services) -> list[Any]:
    """All that MLflow tells of its runs."""
    login = f"admin:{services.secrets['MLFLOW_PASSWORD']}"
    api = f"http://{login}@127.0.0.1:{services.ports['MLFLOW_PORT']}/api/2.0/mlflow"
    return ask(api, "/runs/search", {"experiment_ids": ["1"]})["runs"]


def trainings(services: Services) -> dict[str, int]:
    """How often MLflow has each finished training."""
    told = [run["info"] for run in mlflow_runs(services) if " seed " in run["info"]["run_name"]]
    return dict(Counter(run["run_name"] for run in told if run["status"] == "FINISHED"))


def trial(services: Services, folder: Path) -> dict[str, Any]:
    """Run all that the docs promise; what was seen."""
    api = services.api
    seen: dict[str, Any] = {}
    assert services.inside("id", "-u").strip() == "1000"
    compiled = "from neft_core.sums import compiled; print(bool(compiled()))"
    assert services.inside("python", "-c", compiled).strip() == "True"
    workspace(services, folder)

    def run(name: str, deployment: str, **parameters: Any) -> str:
        state = ended(api, start_run(api, f"neft-pipeline/{deployment}", **parameters), 1200)
        seen[name] = f"{state['type']}: {state['message']}"
        assert state["type"] == "COMPLETED", seen
        return str(state["message"])

    assert " ran" in run("a process of the worker", "nightly")
    assert services.inside("sh", "-c", "find /workspace ! -user neft").strip() == ""
    by_schedule(services)
    found = ask(api, "/deployments/name/neft-pipeline/in-container")["id"]
    runs = {"deployments": {"id": {"any_": [found]}}, "sort": "EXPECTED_START_TIME_ASC"}
    first = until(lambda: ask(api, "/flow_runs/filter", runs), 120)[0]
    state = ended(api, first["id"], 400)
    seen["a container, by its schedule, nothing to do"] = f"{state['type']}: {state['message']}"
    assert state["type"] == "COMPLETED", seen
    assert " ran" not in state["message"]
    ask(api, f"/deployments/{found}", {"paused": True}, "PATCH")
    until(lambda: all(r["end_time"] for r in ask(api, "/flow_runs/filter", runs)), 120)
    other = {"runs": ["lora"], "overrides": ["training.epochs=3"]}
    before = trainings(services)
    assert " ran" in run("a container, other params", "in-container", **other)
    assert trainings(services) == {**before, "lora seed 1": 2}
    left = ["ps", "-aq", "--filter", "label=io.prefect.flow-run-id"]
    until(lambda: not docker(*left))

    # The worker's container is restarted in a run, which is then made again.
    long = {"runs": ["full"], "overrides": ["training.epochs=40"]}
    going = start_run(api, "neft-pipeline/on-demand", **long)
    lines = "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"
    until(lambda: "stage train" in services.inside("sh", "-c", lines), 300)
    (worker,) = services.ids("worker")
    docker("restart", "--time", "1", worker)
    until(lambda: services.health("worker") == "healthy", 180)
    state = ended(api, going, 400)
    seen["worker restarted in a run"] = f"{state['type']}, {state['message']}"
    assert state["type"] in ("CRASHED", "FAILED", "CANCELLED"), state
    run("the same again", "on-demand", **long)

    promote = "neft promote full --name trial --max-forgetting none || test $? = 3"
    seen["promoted"] = services.inside("sh", "-c", promote).strip().splitlines()[-1]
    load = "import mlflow, pandas; model = mlflow.pyfunc.load_model('models:/trial@challenger'); "
    load += "print(model.predict(pandas.DataFrame({'source': ['the cat sees a fish']})))"
    assert services.inside("python", "-c", load).strip()

    # From outside the containers' network, where the store has no name.
    fetch = "import sys; from mlflow.artifacts import download_artifacts as get; "
    fetch += "get('models:/trial/1', dst_path=sys.argv[1])"
    outside = {
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{services.ports['MLFLOW_PORT']}",
        "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": services.secrets["MLFLOW_PASSWORD"],
    }
    line = [sys.executable, "-c", fetch, str(folder / "fetched")]
    subprocess.run(line, env={**os.environ, **outside}, check=True, capture_output=True)
    assert list((folder / "fetched").rglob("*.safetensors"))

    told = services.compose("logs", "--no-color") + f"\n{mlflow_runs(services)}"
    for path in ("/deployments/filter", "/flow_runs/filter", "/logs/filter", "/artifacts/filter"):
        start = 0
        while page := ask(api, path, {"limit": 200, "offset": start}):
            told, start = f"{told}\n{page}", start + len(page)
    for name, secret in services.secrets.items():
        secret = secret.rpartition(":")[2]  # a password without its user too
        found = [line.replace(secret, "...") for line in told.splitlines() if secret in line]
        assert not found, (name, found[:5])
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", help="one that is there; otherwise it is built")
    options = parser.parse_args()
    image = options.image or "neft"
    if not options.image:
        build = ["docker", "build", "-f", "docker/Dockerfile", "-t", image, "."]
        subprocess.run(build, cwd=PROJECT, check=True, stdout=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch, up(Path(scratch), image) as services:
        found = trial(services, Path(scratch))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
