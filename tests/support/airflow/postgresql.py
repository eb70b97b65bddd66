"""A PostgreSQL server of a test's own: on a free port of 127.0.0.1, gone with everything in it afterwards."""

import os
import pwd
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

from tests.support.airflow.standalone import free_port

ADMINISTRATOR = "ferry"


def programs():
    """The directory with PostgreSQL's programs, the newest that is installed; None where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


@contextmanager
def running_postgresql():
    """Starts the server and yields SQLAlchemy's address of an empty database."""
    directory = Path(tempfile.mkdtemp(prefix="ferry-postgresql-"))
    user = _unprivileged(directory)
    try:
        _run(
            user, "initdb", "--pgdata", directory / "data", "--username", ADMINISTRATOR, "--auth", "trust", "--no-sync"
        )
        port = free_port()
        settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={directory} -c fsync=off"
        start = ("pg_ctl", "--pgdata", directory / "data", "--log", directory / "log", "--wait", "--options", settings)
        _run(user, *start, "start")
        try:
            _run(user, "createdb", "--host", "127.0.0.1", "--port", port, "--username", ADMINISTRATOR, "airflow")
            yield f"postgresql+psycopg2://{ADMINISTRATOR}@127.0.0.1:{port}/airflow"
        finally:
            _run(user, "pg_ctl", "--pgdata", directory / "data", "--mode", "immediate", "--wait", "stop")
    finally:
        shutil.rmtree(directory)


def _unprivileged(directory):
    """Whom the server runs as: it refuses to run as root. The directory becomes theirs."""
    if os.getuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = "postgres" if "postgres" in names else "nobody"
    shutil.chown(directory, user)
    return user


def _run(user, program, *arguments):
    command = [str(programs() / program), *map(str, arguments)]
    # pg_ctl's server keeps what it is given open: a pipe would be waited for
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(command, user=user, cwd="/", stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        output.seek(0)
        assert done.returncode == 0, (command, output.read()[-2000:])
