"""Which servers ask for a password, and what they and the worker need for it."""

import pytest

from neft_core import logins
from neft_core.errors import NeftError

LOGIN = {
    "PREFECT_SERVER_API_AUTH_STRING": "me:planted",
    "PREFECT_API_AUTH_STRING": "me:planted",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "planted",
    "MLFLOW_TRACKING_USERNAME": "admin",
    "MLFLOW_TRACKING_PASSWORD": "planted",
}


ALL = ("prefect", "mlflow", "worker")


@pytest.mark.parametrize(
    ("without", "before", "starting", "asks"),
    [
        ((), (), ALL, ["mlflow", "prefect"]),
        ((), ("prefect", "mlflow"), ALL, ["mlflow", "prefect"]),
        (("PREFECT_SERVER_API_AUTH_STRING",), (), ALL, ["mlflow"]),
        # What runs needs no password to go on, and gets none.
        (("MLFLOW_AUTH_ADMIN_PASSWORD",), ("mlflow",), ("worker",), ["mlflow"]),
        (("MLFLOW_TRACKING_PASSWORD",), ("mlflow",), ("mlflow",), ["mlflow"]),
        (("MLFLOW_TRACKING_PASSWORD",), (), ("prefect", "worker"), ["prefect"]),
        ((), ("prefect",), ("worker",), ["prefect"]),
    ],
)
def test_a_server_asks_that_has_a_password_or_had_one(
    monkeypatch, tmp_path, without, before, starting, asks
):
    monkeypatch.setenv("HOME", str(tmp_path))
    told = {name: value for name, value in LOGIN.items() if name not in without}
    assert logins.asking(told, before, starting) == asks


@pytest.mark.parametrize(
    ("without", "before", "starting", "line"),
    [
        ("PREFECT_SERVER_API_AUTH_STRING", "prefect", ALL, "not set, and prefect asked for it be"),
        ("MLFLOW_AUTH_ADMIN_PASSWORD", "mlflow", ("mlflow",), "not set, and mlflow asked for it b"),
        ("PREFECT_API_AUTH_STRING", "", ALL, "not set; the worker needs it to log in to prefect"),
        ("MLFLOW_TRACKING_PASSWORD", "", ALL, "not set; the worker needs it to log in to mlflow"),
        ("MLFLOW_TRACKING_USERNAME", "mlflow", ("worker",), "not set; the worker needs it to log"),
    ],
)
def test_a_login_is_whole(monkeypatch, tmp_path, without, before, starting, line):
    monkeypatch.setenv("HOME", str(tmp_path))
    told = {name: value for name, value in LOGIN.items() if name != without}
    with pytest.raises(NeftError, match=f"^{without}: {line}") as fault:
        logins.asking(told, filter(None, [before]), starting)
    assert "planted" not in str(fault.value)
    for password in logins.PASSWORDS.values():
        with pytest.raises(NeftError, match=f"^{password}: empty; set it, or run"):
            logins.asking({**LOGIN, password: ""}, (), ALL)
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow/credentials").touch()
    told = {name: value for name, value in LOGIN.items() if "TRACKING" not in name}
    assert logins.asking(told, (), ALL) == ["mlflow", "prefect"]


@pytest.mark.parametrize(
    ("host", "asks", "line"),
    [
        ("127.0.0.1", (), ""),
        ("127.0.0.2", (), ""),
        ("::1", (), ""),
        ("localhost", (), ""),
        ("0.0.0.0", ("prefect", "mlflow"), ""),
        ("0.0.0.0", (), "0.0.0.0 can be reached from other machines, prefect and mlflow without"),
        ("10.0.0.1", ("prefect",), "10.0.0.1 can be reached from other machines, mlflow without"),
        ("::", ("mlflow",), ":: can be reached from other machines, prefect without"),
    ],
)
def test_servers_that_others_reach_without_a_password_are_told(host, asks, line):
    told = logins.exposed(host, asks)
    assert told.startswith(f"CAUTION: {line} a password" if line else "")
    assert bool(told) is bool(line)
