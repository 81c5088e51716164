"""The other commands on simulated GPUs, with a run that was trained on two of them."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil

import pytest

ENCODE = """
import sys

sys.path.insert(0, "tools")
import encode

for mode in "", "--fill-mask", "--next", "--score", "--similarity":
    asked = [mode, "w1 <mask>" if mode == "--fill-mask" else "w1 w2 || w3"][not mode :]
    print("status", encode.main([sys.argv[1], "--gpus", "1", *asked]))
"""

SERVER = """
import sys
from pathlib import Path
import requests
from gluon_bert.serving.server import Settings, free_ports, serving

port, management_port = free_ports()
with serving(Path(sys.argv[1]), Settings(port=port, management_port=management_port)) as server:
    replies = [requests.post(server.address, json={"text": f"w1 w{i}"}, timeout=60) for i in range(3)]
    workers = requests.get(f"{server.management}/bert", timeout=60).json()["workers"]
    print([reply.status_code for reply in replies], "on a GPU:", [worker["gpu"] for worker in workers])
    print(server.log.read_text())
"""

SERVE = """
import sys
from gluon_bert.serving import handler

class Context:
    request_ids = {0: "a", 1: "b"}
    system_properties = {"model_dir": sys.argv[1], "gpu_id": 1}

    def set_response_status(self, status, phrase, i):
        print(int(status))

bodies = [b'{"text": "w1 w2"}', b'{"text": "w1", "pair": "w2 <mask>"}']
for reply in handler.handle([{"body": body} for body in bodies], Context()):
    print(reply.decode().strip())
"""


@pytest.mark.parametrize(
    "flags", [(), ("--precision", "fp16"), ("--recompute", "--micro-batch", "4")], ids="-".join
)
def test_finetune_two_gpus_makes_valid_calls(gpus, gpu_run, table, tmp_path, flags):
    given = ("--train", table, "--validation", table, "--epochs", "1", "--batch-size", "7", "--gpus", "0,1")
    result = gpus.tool("finetune", gpu_run, *given, "--output", tmp_path / "tuned", *flags)
    result.assert_valid(2)
    assert len((tmp_path / "tuned" / "predictions.jsonl").read_text().splitlines()) == 24


def test_finetuning_resumes_on_another_number_of_gpus(gpus, gpu_run, table, tmp_path):
    tuned = tmp_path / "tuned"
    given = ("--train", table, "--validation", table, "--epochs", "1", "--gpus", "0,1", "--output", tuned)
    gpus.tool("finetune", gpu_run, *given)
    gpus.tool("finetune", "--resume", tuned, "--gpus", "1").assert_valid(1)
    gpus.tool("encode", tuned, "w1 w2", "--gpus", "1").assert_valid(1)


def test_encode_on_a_gpu_makes_valid_calls(gpus, gpu_run):
    result = gpus.code(ENCODE, gpu_run)
    result.assert_valid(1)
    assert result.output.count("status 0") == 5


def test_export_of_a_gpu_run_is_served_on_a_gpu(gpus, gpu_run, tmp_path):
    gpus.tool("export", gpu_run, "--output", tmp_path / "export").assert_valid(0, num_processes=0)
    # Dropout that follows the seed is for training alone.
    (symbol,) = (tmp_path / "export").glob("*-symbol.json")
    operators = {node["op"] for node in json.loads(symbol.read_text())["nodes"]}
    assert "FullyConnected" in operators and "Dropout" not in operators
    result = gpus.code(SERVE, tmp_path / "export")
    result.assert_valid(1)
    assert result.output.split("\n")[:2] == ["200", "200"]
    assert [json.loads(line) for line in result.output.splitlines()[2:]]


def test_server_answers_with_a_worker_on_a_gpu(gpus, gpu_run, tmp_path):
    if importlib.util.find_spec("mms") is None or shutil.which("java") is None:
        pytest.skip("needs the extra serve and Java")
    gpus.tool("export", gpu_run, "--output", tmp_path / "export", "--format", "mar")
    # The server asks this program how many GPUs there are.
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf 'index\\n0\\n1\\n'\n")
    program.chmod(0o755)
    path = os.pathsep.join([str(program.parent), os.environ["PATH"]])
    # The worker is killed in the end, so there is a log of it and no report.
    result = gpus.code(SERVER, tmp_path / "export" / "bert.mar", log=True, PATH=path)
    assert "[200, 200, 200] on a GPU: [True]" in result.output
    assert len({line.split()[1] for line in result.lines("launch")}) == 1
    assert not result.lines("FAULT")
