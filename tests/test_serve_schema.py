"""The server under a fuzzer that knows OpenAI's interface: no failure, answers as described."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from llamac.export import export_bundle
from llamac.model.checkpoint import open_checkpoint
from llamac.model.load import DEMO_FOLDER
from openai_description import describe
from serving import serving

NUM_EXAMPLES = 15  # of each operation, drawn; more are counted out
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("schemathesis") is None, reason="pip install 'llamac[dev]'")
def test_no_request_breaks_the_server_and_every_answer_is_as_described(tmp_path: Path):
    file = tmp_path / "openai.json"
    file.write_text(json.dumps(describe()))
    bundle = export_bundle(
        open_checkpoint(DEMO_FOLDER), tmp_path / "demo", batch_size=4, max_seq_len=64
    ).folder
    with serving(bundle) as served:
        # In one thread: Python 3.11 miscounts the depth of syntax trees that threads parse at once.
        words = (
            "--url",
            f"http://127.0.0.1:{served.port}",
            "--seed",
            "0",
            "--checks",
            ",".join(CHECKS),
        )
        done = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", str(file), *words),
                *("--max-examples", str(NUM_EXAMPLES)),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert served.ask("/health")[0] == 200
        assert served.gauge("num_requests_running") == served.gauge("num_requests_waiting") == 0
