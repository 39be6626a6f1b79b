"""Elasticsearch servers for tests and benchmarks: found, started, killed on purpose, and stopped.

Where a server comes from, the first that applies:
1. `GUMSHOE_ES_URL` (with `GUMSHOE_ES_API_KEY`, or `GUMSHOE_ES_USER` and `GUMSHOE_ES_PASSWORD`, and `GUMSHOE_ES_CA_CERTS`): a server of
   the user's own, used as it is. Tests touch only indexes whose names begin with their own prefix.
2. `GUMSHOE_ES_ZIP`: a distribution, unpacked to a temporary folder.
3. Maven on the path: it fetches the same distribution and caches it.
4. Otherwise there is none: `Missing`, whose text begins with "needs" and says how to mend it.
Tests that kill a server or change its users never use the first.

Invariants: a server that was started here is stopped with its process group, and its folders go with it; it listens on
loopback only; when root, it runs as another user, since Elasticsearch refuses root.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

ARTIFACT = "org.elasticsearch.distribution.integ-test-zip:elasticsearch:8.19.8:zip"
NOBODY = 65534
START_S = 300.0
"""Ten seconds on a quiet machine."""
HEAP = "512m"
_SETTINGS = """\
discovery.type: single-node
network.host: 127.0.0.1
http.port: {http}
transport.port: {transport}
path.data: {data}
path.logs: {logs}
"""
_LOGGING = """\
status = error
appender.file.type = File
appender.file.name = file
appender.file.fileName = ${sys:es.logs.base_path}/server.log
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = %d %p %c: %m%n%xEx
rootLogger.level = info
rootLogger.appenderRef.file.ref = file
"""


class Missing(Exception):
    """There is no server to be had; the text is a reason to skip that says what to do."""


@dataclass(frozen=True)
class Access:
    """How to reach a server, as the backend's config wants it: secrets stand in the environment under the names given."""

    url: str
    api_key_env: str = ""
    user_env: str = ""
    password_env: str = ""
    ca_certs: str = ""
    prefix: str = field(default_factory=lambda: f"gumshoe-test-{secrets.token_hex(4)}-")
    """With which the names of a test's indexes begin."""


def given() -> Access | None:
    """The user's own server, by the environment."""
    url = os.environ.get("GUMSHOE_ES_URL", "")
    if not url:
        return None
    names = {
        "api_key_env": "GUMSHOE_ES_API_KEY",
        "user_env": "GUMSHOE_ES_USER",
        "password_env": "GUMSHOE_ES_PASSWORD",
    }
    return Access(
        url,
        ca_certs=os.environ.get("GUMSHOE_ES_CA_CERTS", ""),
        **{key: name for key, name in names.items() if os.environ.get(name)},
    )


class Distribution:
    """Elasticsearch unpacked in a temporary folder, from which servers are started. Raises Missing."""

    def __init__(self) -> None:
        self.java_home = _java_home()
        self.user = NOBODY if os.getuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix="gumshoe-es-"))
        try:
            self.folder.chmod(0o755)  # another user may have to enter it
            self.home = self._unpack(_archive(self.folder))
        except BaseException:
            self.remove()
            raise

    def _unpack(self, archive: Path) -> Path:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(self.folder)
            for item in packed.infolist():  # zipfile forgets who may execute
                mode = stat.S_IMODE(item.external_attr >> 16)
                (self.folder / item.filename).chmod((mode or 0o644) | 0o444 | (0o111 if item.is_dir() else 0))
        homes = [path for path in self.folder.iterdir() if (path / "bin" / "elasticsearch").is_file()]
        if not homes:
            raise Missing(f"needs an Elasticsearch distribution, and {archive} holds none; mend GUMSHOE_ES_ZIP")
        return homes[0]

    def server(self, **options: object) -> Server:
        return Server(self, **options)  # type: ignore[arg-type]

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Server:
    """One node with a data folder of its own. `with distribution.server() as server: ... server.url ...`"""

    def __init__(
        self,
        distribution: Distribution,
        *,
        users: Mapping[str, tuple[str, str]] | None = None,
        roles: str = "",
        certificate: tuple[bytes, bytes] | None = None,
        settings: str = "",
    ) -> None:
        """`users`: name to (password, role), which turns security on; `roles`: the text of roles.yml; `certificate`: key and
        certificate as PEM, which turns TLS on; `settings`: more lines of elasticsearch.yml."""
        self._distribution = distribution
        self._folder = Path(tempfile.mkdtemp(prefix="node-", dir=distribution.folder))
        self._process: subprocess.Popen[bytes] | None = None
        self.port, transport = _free_ports(2)
        self.scheme = "https" if certificate else "http"
        config = self._folder / "config"
        shutil.copytree(distribution.home / "config", config)
        (config / "log4j2.properties").write_text(_LOGGING)
        lines = _SETTINGS.format(
            http=self.port, transport=transport, data=self._folder / "data", logs=self._folder / "logs"
        )
        lines += f"xpack.security.enabled: {'true' if users else 'false'}\n{settings}"
        if certificate:
            for name, content in zip(("http.key", "http.crt"), certificate, strict=True):
                (config / name).write_bytes(content)
            lines += (
                "xpack.security.http.ssl.enabled: true\nxpack.security.http.ssl.key: http.key\n"
                "xpack.security.http.ssl.certificate: http.crt\n"
            )
        (config / "elasticsearch.yml").write_text(lines)
        (config / "roles.yml").write_text(roles)
        for name in ("data", "logs", "tmp"):
            (self._folder / name).mkdir()
        if distribution.user is not None:
            for path in (self._folder, *self._folder.rglob("*")):
                os.chown(path, distribution.user, distribution.user)
        self._environment = {
            "PATH": os.environ.get("PATH", ""),
            "ES_JAVA_HOME": str(distribution.java_home),
            "ES_JAVA_OPTS": f"-Xms{HEAP} -Xmx{HEAP}",
            "ES_PATH_CONF": str(config),
            "ES_TMPDIR": str(self._folder / "tmp"),
            "HOME": str(self._folder),
            "LC_ALL": "C.UTF-8",  # passwords on a command line
        }
        for name, (password, role) in (users or {}).items():
            self._run("elasticsearch-users", "useradd", name, "-p", password, "-r", role)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        """Starts it, also on the data of a run before, and waits until it answers. Raises RuntimeError with its last words."""
        with (self._folder / "console.log").open("ab") as console:
            self._process = subprocess.Popen(
                [str(self._distribution.home / "bin" / "elasticsearch")],
                cwd=self._folder, env=self._environment, stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                start_new_session=True, **self._as_user(),
            )  # fmt: skip
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                why = "took too long to start" if self._process.poll() is None else "ended"
                self.kill()
                raise RuntimeError(f"Elasticsearch {why}: {self.last_words()}")
            time.sleep(0.2)

    def stop(self) -> None:
        self._end(signal.SIGTERM, 20.0)

    def kill(self) -> None:
        """SIGKILL to all of it: nothing is flushed, nobody says goodbye. `start` brings it back with its data."""
        self._end(signal.SIGKILL, 20.0)

    def last_words(self) -> str:
        files = (self._folder / "console.log", self._folder / "logs" / "server.log")
        return "\n".join(f.read_text(errors="replace")[-3000:] for f in files if f.is_file())

    def _end(self, how: signal.Signals, patience_s: float) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for sign, wait_s in ((how, patience_s), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait_s)
                break
        with contextlib.suppress(ProcessLookupError):  # the launcher may be gone before the JVM it started
            os.killpg(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 20.0
        while _group_lives(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _answers(self) -> bool:
        context = ssl._create_unverified_context() if self.scheme == "https" else None
        try:
            with urlopen(
                Request(f"{self.url}/_cluster/health?wait_for_status=yellow&timeout=1s"), timeout=3, context=context
            ):
                return True
        except HTTPError as error:
            return error.code == 401
        except OSError:
            return False

    def _as_user(self) -> dict[str, object]:
        user = self._distribution.user
        return {} if user is None else {"user": user, "group": user, "extra_groups": []}

    def _run(self, tool: str, *arguments: str) -> None:
        subprocess.run(
            [str(self._distribution.home / "bin" / tool), *arguments], cwd=self._folder, env=self._environment, check=True,
            capture_output=True, timeout=START_S, **self._as_user(),
        )  # fmt: skip


def certificate(folder: Path) -> tuple[bytes, bytes, Path]:
    """Key and certificate (PEM) of 127.0.0.1, and the file of the authority that signed it: itself."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gumshoe test")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName(
        [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
    )
    built = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2)).add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(key, hashes.SHA256())
    )  # fmt: skip
    pem = built.public_bytes(serialization.Encoding.PEM)
    (folder / "ca.pem").write_bytes(pem)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private, pem, folder / "ca.pem"


def _archive(folder: Path) -> Path:
    named = os.environ.get("GUMSHOE_ES_ZIP", "")
    if named:
        if not Path(named).is_file():
            raise Missing(f"needs the Elasticsearch distribution that GUMSHOE_ES_ZIP names; {named} is not a file")
        return Path(named)
    maven = shutil.which("mvn")
    trouble = ""
    if maven:
        command = [maven, "-q", "-B", "dependency:copy", f"-Dartifact={ARTIFACT}", f"-DoutputDirectory={folder}"]
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600
        )
        found = list(folder.glob("*.zip"))
        if done.returncode == 0 and found:
            return found[0]
        trouble = f" (Maven could not fetch one: {' '.join((done.stdout or done.stderr).split())[:300]})"
    raise Missing(
        "needs an Elasticsearch server: set GUMSHOE_ES_URL to yours, or GUMSHOE_ES_ZIP to a distribution "
        f"({ARTIFACT}), or install Maven, which fetches it{trouble}"
    )


def _java_home() -> Path:
    named = os.environ.get("ES_JAVA_HOME") or os.environ.get("JAVA_HOME")
    if named and (Path(named) / "bin" / "java").is_file():
        return Path(named)
    java = shutil.which("java")
    if java is None:
        raise Missing("needs Java 17 or newer to start Elasticsearch: apt-get install openjdk-17-jre-headless")
    return Path(java).resolve().parent.parent


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _group_lives(group: int) -> bool:
    """Whether a process of the group still runs; one that has ended and that nobody has waited for does not count."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, _, its_group = path.read_text().rsplit(")", 1)[1].split()[:3]
            if int(its_group) == group and state != "Z":
                return True
    return False
