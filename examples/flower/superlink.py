"""A real federation of Flower on one machine: a SuperLink with TLS, and SuperNodes with keys that
it knows. `federation.py` runs the example in it; a deployment has the same parts on many machines.

Every process that is started here is a child of this one, and is ended by its number.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

ROOT = Path(__file__).parents[2]


class Federation:
    """The processes of a federation, and runs of apps in it."""

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

    def start(self, app: Path, config: Mapping[str, object]) -> None:
        """Start a run of an app. Success is what it writes, never an exit code."""
        told = " ".join(
            f"{name}={value}" if isinstance(value, int) else f'{name}="{value}"'
            for name, value in config.items()
        )
        self.flwr("run", str(app), "here", "--run-config", told)

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


@contextmanager
def federation(
    folder: Path, work: Path, nodes: int, database: bool = False
) -> Iterator[Federation]:
    """A SuperLink and its nodes, until the end of the block.

    Args:
        folder: of its logs, keys and state.
        work: where `certificates` wrote.
        database: keep the link's state in a file; without, in memory.
    """
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
    run = Federation(folder, environment, port)
    with run.stack:
        run.process("superlink", command)
        wait_until_open(port)
        for k in range(nodes):
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
    """A certificate authority of our own, and a server that it vouches for: `ca.crt`, `server.crt`
    and `server.key` in a folder.
    """
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
