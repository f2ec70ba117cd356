"""The services of docker/compose.yaml as processes of this machine, without Docker.

Each has the command and the environment that compose.yaml and the Dockerfile give it, and nothing
of ours but what stands for the container: addresses, ports and folders. PostgreSQL is Debian's, and
moto stands for the S3 store.
"""

import contextlib
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from operating import PROJECT, free_port, until
from ruamel.yaml import YAML

MARK = "NEFT_STACK"
COMPOSE = PROJECT / "docker/compose.yaml"


def compose(settings: dict[str, str]) -> dict[str, Any]:
    """compose.yaml with its variables filled in, as the Compose specification says."""

    def filled(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: filled(value) for key, value in node.items()}
        if isinstance(node, list):
            return [filled(value) for value in node]
        return (
            re.sub(r"\$\{(\w+)(?::([-?])([^}]*))?\}", value, node)
            if isinstance(node, str)
            else node
        )

    def value(found: re.Match[str]) -> str:
        name, how, otherwise = found.groups()
        if settings.get(name):
            return settings[name]
        if how == "?":
            raise ValueError(f"{name}: {otherwise}")
        return otherwise or ""

    return filled(YAML(typ="safe").load(COMPOSE.read_text(encoding="utf-8")))["services"]


def image_environment() -> dict[str, str]:
    """What the Dockerfile's last stage sets."""
    text = (PROJECT / "docker/Dockerfile").read_text().replace("\\\n", " ").rpartition("\nFROM ")[2]
    pairs = [pair for line in re.findall(r"^ENV (.*)$", text, re.M) for pair in line.split()]
    return dict(pair.split("=", 1) for pair in pairs)


def postgresql() -> Path | None:
    """The folder of PostgreSQL's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).resolve().parent if on_path else None


class Stack:
    """Services that can be started, asked and killed by name.

    Attributes:
        folder: where all their files lie.
        api: of Prefect.
        tracking: of MLflow.
        secrets: every password and key, which may appear nowhere.
    """

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        names = re.findall(r"^(\w+)=$", (PROJECT / "docker/.env.example").read_text(), re.M)
        names += ["HF_TOKEN"]
        self.secrets = {name: f"planted-{secrets.token_hex(8)}" for name in names}
        self.secrets["PREFECT_AUTH"] = f"team:{secrets.token_hex(12)}"
        self.ports = {name: free_port() for name in ("postgres", "s3", "prefect", "mlflow")}
        self.services = compose({**self.secrets, **settings})
        login = self.secrets["PREFECT_AUTH"]
        self.api = f"http://{login}@127.0.0.1:{self.ports['prefect']}/api"
        login = f"admin:{self.secrets['MLFLOW_PASSWORD']}"
        self.tracking = f"http://{login}@127.0.0.1:{self.ports['mlflow']}"
        users = (PROJECT / "docker/users.ini").read_text()
        (folder / "users.ini").write_text(users.replace("/state/", f"{folder}/state/"))
        self.worker_ports: dict[str, int] = {}
        self.children: dict[str, subprocess.Popen[bytes]] = {}

    def here(self, text: str) -> str:
        """A container's addresses, ports and folders as they are on this machine."""
        inside = {"postgres": 5432, "s3": 9000, "prefect": 4200, "mlflow": 5000}
        for name, port in inside.items():
            mine = f"127.0.0.1:{self.ports[name]}"
            text = re.sub(rf"(?<=[/@]){name}:{port}\b|127\.0\.0\.1:{port}\b", mine, text)
            text = re.sub(rf"^{port}$|(?<=mlflow:){port}$", str(self.ports[name]), text)
            text = re.sub(rf"(?<=mlflow:){port}(?=,)", str(self.ports[name]), text)
        text = re.sub(r"^0\.0\.0\.0$", "127.0.0.1", text)
        text = re.sub(r"^/etc/neft\b", str(self.folder), text)
        return re.sub(r"^/(state|workspace)\b", str(self.folder) + r"/\1", text)

    def environment(self, service: str, name: str | None = None) -> dict[str, str]:
        """What a service has in its environment, and nothing of this process."""
        name = name or service
        told = {**image_environment(), **self.services[service].get("environment", {})}
        home = self.folder / "home" / name
        home.mkdir(parents=True, exist_ok=True)
        found = {key: self.here(str(value)) for key, value in told.items()}
        if name == "worker-2":  # logs in by the address, which nothing may repeat
            found["MLFLOW_TRACKING_URI"] = self.tracking
            del found["MLFLOW_TRACKING_USERNAME"], found["MLFLOW_TRACKING_PASSWORD"]
        if service == "worker":
            found["HF_TOKEN"] = self.secrets["HF_TOKEN"]
        return {
            **found,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.defpath]),
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "DVC_SITE_CACHE_DIR": str(self.folder / "site"),
            "OMP_NUM_THREADS": "1",
            "PREFECT_WORKER_WEBSERVER_PORT": str(self.worker_ports.setdefault(name, free_port())),
            "FAKE_DELAY": "1",  # of `fabricated`: seconds for each step of a training
            MARK: f"{self.folder} {name} ",
        }

    def command(self, service: str) -> list[str]:
        """A service's command line."""
        return [self.here(part) for part in self.services[service]["command"]]

    def start(self, service: str, name: str | None = None) -> None:
        """Start a service, and wait for nothing."""
        name = name or service
        place = self.folder / "workspace"
        with (self.folder / f"{name}.log").open("ab") as log:
            self.children[name] = subprocess.Popen(
                self.command(service), env=self.environment(service, name), cwd=place,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def run(self, service: str, *command: str) -> str:
        """A command in a service's environment, as `docker compose exec` runs it."""
        done = subprocess.run(
            command or self.command(service), env=self.environment(service),
            cwd=self.folder / "workspace", capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _postgresql(self, program: str, *argv: str) -> str:
        tools = postgresql()
        assert tools is not None
        login = ["-h", "127.0.0.1", "-p", str(self.ports["postgres"]), "-U", "neft"]
        env = {"PGPASSWORD": self.secrets["POSTGRES_PASSWORD"], "PATH": os.defpath}
        line = [str(tools / program), *login, *argv]
        return subprocess.run(line, env=env, check=True, capture_output=True, text=True).stdout

    def dump(self, database: str) -> str:
        """All that a database holds, as SQL."""
        return self._postgresql("pg_dump", database)

    def sql(self, statement: str) -> None:
        """Run a statement as the databases' owner."""
        self._postgresql("psql", "-d", "prefect", "-c", statement)

    def healthy(self, service: str) -> bool:
        """What a service's health check says."""
        test = self.services[service].get("healthcheck", {}).get("test")
        if test is None:  # the image's own
            text = (PROJECT / "docker/Dockerfile").read_text()
            test = ["CMD", *YAML(typ="safe").load(re.findall(r"^ +CMD (\[.*\])$", text, re.M)[0])]
        port = str(self.worker_ports.get(service, 8080))
        line = [self.here(part).replace("127.0.0.1:8080", f"127.0.0.1:{port}") for part in test[1:]]
        env = self.environment(service) | {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.ports["postgres"]),
        }
        done = subprocess.run(line, env=env, capture_output=True, timeout=60)
        return done.returncode == 0

    def processes(self, name: str | None = None) -> list[int]:
        """Living processes of a service with all that it started, or of all services."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                alive = (place / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
                told = (place / "environ").read_bytes().split(b"\0")
                mark = f"{MARK}={self.folder} ".encode()
                if alive and [
                    v for v in told if v.startswith(mark + (f"{name} " if name else "").encode())
                ]:
                    found.append(int(place.name))
        return found

    def kill(self, name: str) -> None:
        """End a service as a container that is killed: every process of it at once."""
        while pids := self.processes(name):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for started, child in self.children.items():
            if name in ("", started):
                child.wait(30)

    def wait(self, service: str) -> None:
        """Until a service is healthy."""

        def asked() -> bool:
            log = self.folder / f"{service}.log"
            assert self.children[service].poll() is None, log.read_text()[-2000:]
            return self.healthy(service)

        until(asked, 180)


@contextlib.contextmanager
def database(stack: Stack) -> Iterator[None]:
    """PostgreSQL as its image sets it up: a user with password, a database, databases.sql."""
    tools = postgresql()
    assert tools is not None
    service = stack.services["postgres"]["environment"]
    # Not below pytest's folder, which only its owner may enter; root can't run PostgreSQL.
    place = Path(tempfile.mkdtemp(prefix="neft-pg-"))
    user = "postgres" if os.geteuid() == 0 else None
    if user:
        os.chown(place, pwd.getpwnam(user).pw_uid, -1)
    env = {"PATH": os.defpath, "LANG": "C.UTF-8", "PGPASSWORD": service["POSTGRES_PASSWORD"]}
    login = ["--host", "127.0.0.1", "--port", str(stack.ports["postgres"]),
             "--username", service["POSTGRES_USER"]]  # fmt: skip

    def run(*command: str, **more: Any) -> None:
        line = [str(tools / command[0]), *command[1:]]
        subprocess.run(line, check=True, capture_output=True, cwd="/", env=env, **more)

    try:
        secret = place / "secret"
        secret.write_text(service["POSTGRES_PASSWORD"])
        secret.chmod(0o644)
        run("initdb", "--pgdata", f"{place}/data", "--username", service["POSTGRES_USER"],
            "--pwfile", str(secret), "--auth", "scram-sha-256", "--no-sync", user=user)  # fmt: skip
        secret.unlink()
        server = subprocess.Popen(
            [str(tools / "postgres"), "-D", f"{place}/data", "-k", str(place), "-F",
             "-p", str(stack.ports["postgres"]), "-c", "listen_addresses=127.0.0.1"],
            user=user, cwd="/", env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            asked = [str(tools / "pg_isready"), *login]
            until(lambda: subprocess.run(asked, capture_output=True, env=env).returncode == 0)
            run("createdb", *login, service["POSTGRES_DB"])
            script = str(PROJECT / "docker/databases.sql")
            run("psql", *login, "--dbname", service["POSTGRES_DB"], "--file", script)
            yield
        finally:
            server.send_signal(signal.SIGQUIT)  # at once
            server.wait(30)
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def store(port: int) -> Iterator[None]:
    """An S3 server without authorisation, on this machine."""
    serve = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        serve, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            import socket

            def answers() -> bool:
                assert server.poll() is None
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), timeout=5).close()
                    return True
                return False

            until(answers)
            yield
        finally:
            server.kill()


@contextlib.contextmanager
def running(folder: Path, workers: int = 1, **settings: str) -> Iterator[Stack]:
    """Every service, healthy; a second worker is `worker-2`."""
    stack = Stack(folder, **settings)
    try:
        with database(stack), store(stack.ports["s3"]):
            until(lambda: stack.healthy("postgres"))
            for volume in ("workspace", "state"):
                (folder / volume).mkdir()
            stack.run("bucket")
            stack.run("bucket")  # a restart finds it there
            stack.start("prefect")
            stack.start("mlflow")
            stack.wait("prefect")
            stack.wait("mlflow")
            for number in range(1, workers + 1):
                stack.start("worker", "worker" if number == 1 else f"worker-{number}")
            stack.wait("worker")
            try:
                yield stack
            finally:
                # Before the database that they are connected to.
                stack.kill("")
    finally:
        stack.kill("")
