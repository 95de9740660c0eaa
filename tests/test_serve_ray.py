"""The server as a deployment of Ray Serve, a replica killed under load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llamac.export import export_bundle
from llamac.model.checkpoint import open_checkpoint
from llamac.model.load import DEMO_FOLDER

_RUN = """
import json, os, signal, sys, time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
import ray
from ray import serve
from llamac.runtime.serve.ray_app import deployment

ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
serve.run(deployment(sys.argv[1], num_replicas=2))

def ask(path, body=None):
    connection = HTTPConnection("127.0.0.1", int(sys.argv[2]), timeout=60)
    try:
        connection.request("GET" if body is None else "POST", path, body and json.dumps(body))
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except (OSError, HTTPException):
        return 0, ""
    finally:
        connection.close()

def until_ready():
    while ask("/health")[0] != 200:
        time.sleep(0.2)

def replicas():
    found = []
    for folder in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if open(f"/proc/{folder}/cmdline", "rb").read().startswith(b"ray::ServeReplica"):
                found.append(int(folder))
        except OSError:
            pass
    return found

until_ready()
body = {"prompt": "Once upon a time", "max_tokens": 300, "ignore_eos": True, "stream": True}
with ThreadPoolExecutor(16) as pool:
    jobs = [pool.submit(ask, "/v1/completions", body) for _ in range(16)]
    time.sleep(0.5)
    killed = replicas()[0]
    os.kill(killed, signal.SIGKILL)
    told = [job.result() for job in jobs]
while len(replicas()) < 2 or killed in replicas():
    time.sleep(0.2)
until_ready()
later = [ask("/v1/completions", {"prompt": "Once", "max_tokens": 3})[0] for _ in range(8)]
print(json.dumps({"told": told, "later": later}), flush=True)
serve.shutdown()
ray.shutdown()
"""


@pytest.mark.slow
def test_a_killed_replica_cuts_its_streams_and_is_replaced(tmp_path: Path):
    pytest.importorskip("ray.serve", reason="ray is not installed; pip install 'llamac[ray]'")
    bundle = export_bundle(open_checkpoint(DEMO_FOLDER), tmp_path / "demo", batch_size=4).folder
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN, str(bundle), "8131"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # Ray's own processes, too
        raise
    run = json.loads(next(line for line in out.splitlines() if line.startswith('{"told"')))
    whole = [text for status, text in run["told"] if status == 200]
    assert len(whole) >= 4
    # No stream is silently short: it ends whole, tells of an error, or is cut.
    assert all("[DONE]" in text or '"error"' in text for text in whole)
    assert run["later"] == [200] * 8
