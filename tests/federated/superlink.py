"""The long run over Flower: a SuperLink with TLS and node keys, four SuperNodes, and everything
that can go wrong.

    python -m tests.federated.superlink FOLDER          # 10 to 20 minutes; no part of the tests

Prints a table and exits with 1 where a scenario does not end as it must. Every process that it
starts is a child of its own, and is ended by its number.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
NODES = 4
Expected = Callable[[dict[str, Any]], bool]


def main(work: Path) -> int:
    work.mkdir(parents=True, exist_ok=True)
    certificates(work)
    right: list[bool] = []

    def row(name: str, said: str, held: bool) -> None:
        print(f"| {name} | {said} | {'as it must' if held else 'NOT AS IT MUST'} |", flush=True)
        right.append(held)

    with federation(work / "memory", work) as run:
        row("a stranger's key", *stranger(work, run.port))
        row("NaN; a wrong shape", *scenario(run, "values", values))
        row("server killed after three uploads", *killed(run))
        row("raises; is killed; never answers", *scenario(run, "processes", failures))
        peaks = {name: round(peak(process)) for name, process in run.processes.items()}
        print("peak MB:", peaks)
    with federation(work / "sqlite", work, database=True) as run:
        row("a locked database, 20 s", *locked(run))
    return 0 if all(right) else 1


# Scenarios.


def values(found: dict[str, Any]) -> bool:
    said = " ".join(found["failed"])
    return sorted(found["clients"]) == ["client0", "client1"] and "NaN" in said and "6" in said


def failures(found: dict[str, Any]) -> bool:
    return sorted(found["clients"]) == ["client0"] and len(found["failed"]) == 3


def everybody(found: dict[str, Any]) -> bool:
    return len(found["clients"]) == NODES


class Runs:
    """Starts nodes and runs of the app."""

    def __init__(self, folder: Path, environment: dict[str, str], port: int) -> None:
        self.folder, self.environment, self.port = folder, environment, port
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.commands: dict[str, list[str]] = {}
        self.stack = ExitStack()

    def process(self, name: str, command: list[str]) -> None:
        """Start one, or start it again."""
        self.commands[name] = command
        made = child(command, self.environment, self.folder / name.replace(" ", ""))
        self.processes[name] = self.stack.enter_context(made)

    def restart(self) -> list[str]:
        """End all processes and start them again; the names of those that had ended before."""
        ended = [name for name, process in self.processes.items() if process.poll() is not None]
        commands = dict(self.commands)
        self.stack.close()
        for name, command in commands.items():
            self.process(name, command)
            if name == "superlink":
                wait_until_open(self.port)
        return ended

    def start(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        config = f'folder="{folder}" scenario="{name}"'
        self.flwr("run", str(HERE / "superlink_app"), "here", "--run-config", config)
        return folder

    def flwr(self, *arguments: str) -> str:
        done = subprocess.run(
            ["flwr", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"flwr {arguments[0]}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.stdout


def wait_for(path: Path, seconds: float) -> bool:
    began = time.monotonic()
    while not path.exists():
        if time.monotonic() - began > seconds:
            return False
        time.sleep(1)
    return True


def scenario(run: Runs, name: str, held: Expected) -> tuple[str, bool]:
    folder = run.start(name)
    if not wait_for(folder / "result.json", 600):
        return "no result after 600 s", False
    found = json.loads((folder / "result.json").read_text())
    reasons = "; ".join(re.sub(r"\s+", " ", reason)[:90] for reason in found["failed"])
    kept = ", ".join(found["clients"])
    return f"kept {kept} in {found['seconds']:.0f} s; {reasons or 'nobody failed'}", held(found)


def killed(run: Runs) -> tuple[str, bool]:
    folder = run.start("killed")
    if not wait_for(folder / "killed-once", 600):
        return "never had three uploads", False
    time.sleep(5)
    kept = len(list((folder / "round" / "clients").glob("*.json")))
    text, whole = scenario(run, "killed", everybody)
    trained = [len((folder / f"trained-{k}").read_text()) for k in range(NODES)]
    return (
        f"{kept} on disk after the kill; second run: {text}; trained {trained} times",
        whole and kept >= 3 and trained == [1] * NODES,
    )


def locked(run: Runs) -> tuple[str, bool]:
    """Nobody else writes for 20 s, from the moment when all clients have trained. Uploads get
    errors, the run loses its permission to pull, and the link starts no other run: all processes
    are started again, and the round is run again.
    """
    folder = run.start("locked")
    while len(list(folder.glob("trained-*"))) < NODES:
        time.sleep(0.05)
    with sqlite3.connect(run.folder / "state.db", timeout=60, isolation_level=None) as database:
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(20)
        database.execute("ROLLBACK")
    time.sleep(30)
    first = len(list((folder / "round" / "clients").glob("*.json")))
    ended = run.restart()
    text, whole = scenario(run, "locked", everybody)
    trained = [len((folder / f"trained-{k}").read_text()) for k in range(NODES)]
    return (
        f"{first} kept, {len(ended)} processes ended; all started again, second run: {text}; "
        f"trained {trained} times",
        whole and trained == [1] * NODES,
    )


def stranger(work: Path, port: int) -> tuple[str, bool]:
    key = node_key(work / "stranger")
    environment = settings(work / "stranger-home")
    command = [*supernode(work, port, key, NODES), "--max-retries", "1"]
    with (work / "stranger.log").open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        try:
            code = process.wait(180)
        except subprocess.TimeoutExpired:
            process.kill()
            return "was still there after 180 s", False
    return f"its node ended with code {code}", code != 0


# Processes.


@contextmanager
def federation(folder: Path, work: Path, database: bool = False) -> Iterator[Runs]:
    folder.mkdir(parents=True, exist_ok=True)
    port, environment = free_port(), settings(folder / "home")
    (folder / "home").mkdir(exist_ok=True)
    (folder / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\n'
        f'root-certificates = "{work / "ca.crt"}"\n'
    )
    command = ["flower-superlink", "--port", str(port), "--enable-supernode-auth"]
    command += ["--disable-runtime-dependency-installation"]
    for option, name in (("ca-certfile", "ca.crt"), ("certfile", "server.crt")):
        command += [f"--ssl-{option}", str(work / name)]
    command += ["--ssl-keyfile", str(work / "server.key")]
    command += ["--database", str(folder / "state.db")] if database else []
    run = Runs(folder, environment, port)
    with run.stack:
        run.process("superlink", command)
        wait_until_open(port)
        for k in range(NODES):
            key = node_key(folder / f"key{k}")
            run.flwr("supernode", "register", f"{key}.pub", "here")
            run.process(f"node {k}", supernode(work, port, key, k))
        yield run


def supernode(work: Path, port: int, key: Path, number: int) -> list[str]:
    command = ["flower-supernode", "--superlink", f"127.0.0.1:{port}"]
    command += ["--root-certificates", str(work / "ca.crt"), "--port", str(free_port())]
    command += ["--auth-supernode-private-key", str(key)]
    return [*command, "--node-config", f"partition-id={number}"]


@contextmanager
def child(
    command: list[str], environment: dict[str, str], name: Path
) -> Iterator[subprocess.Popen[bytes]]:
    with name.with_suffix(".log").open("ab") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            yield process
        finally:
            with ExitStack() as ignored:
                ignored.push(lambda *error: True)
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(20)
            with ExitStack() as ignored:
                ignored.push(lambda *error: True)
                os.killpg(process.pid, signal.SIGKILL)


def settings(home: Path) -> dict[str, str]:
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }


def peak(process: subprocess.Popen[bytes]) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+)", status)
    return int(found[1]) / 1000 if found else float("nan")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_open(port: int) -> None:
    for _ in range(180):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(1)
    raise RuntimeError("the SuperLink did not start")


# Keys.


def node_key(path: Path) -> Path:
    """An EC key on P-384, and its public half beside it."""
    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH
    path.write_bytes(pem(key, form))
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    path.with_name(path.name + ".pub").write_bytes(public)
    return path


def pem(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, form, plain)


def certificates(work: Path) -> None:
    """A certificate authority of our own, and a server that it vouches for."""
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sapmerge test authority")])
    here = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]

    def certificate(
        subject: x509.Name, key: ec.EllipticCurvePrivateKey, root: bool
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.timezone.utc)
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(name)
        made = made.public_key(key.public_key()).serial_number(x509.random_serial_number())
        made = made.not_valid_before(now - datetime.timedelta(days=1))
        made = made.not_valid_after(now + datetime.timedelta(days=2))
        made = made.add_extension(x509.BasicConstraints(ca=root, path_length=None), critical=True)
        if not root:
            made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return made.sign(authority, hashes.SHA384())

    encoding = serialization.Encoding.PEM
    (work / "ca.crt").write_bytes(certificate(name, authority, True).public_bytes(encoding))
    (work / "server.crt").write_bytes(certificate(here, server, False).public_bytes(encoding))
    (work / "server.key").write_bytes(pem(server, serialization.PrivateFormat.PKCS8))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
