"""Blocks on Ray: equal to the last bit to one process, whoever is killed meanwhile. Runs where Ray is installed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small import a_tokenizer, llama

import lxt
from lxt.neurons.on_ray import on_ray
from lxt.neurons.running import label

WORKERS = 2
TEXTS = [f"I have {number} cats and {number % 7} dogs. My cats love to play" for number in range(48)]
OPTIONS = {"top": 4, "length": 24, "batch_size": 3, "block_size": 4, "layers": [0, 2]}
BLOCKS = 12

SCRIPT = """
import os, sys, time
import ray, torch
sys.path[:0] = {paths!r}
from test_neurons_ray import OPTIONS, TEXTS, WORKERS, a_tokenizer, llama, lxt
from lxt.neurons.on_ray import on_ray
from lxt.neurons.running import label

class Logged:
    def __init__(self, function):
        self.function, self.explainer = function, function.explainer

    def __call__(self, block):
        with open({log!r}, "a") as log:
            log.write(f"{{block.number}} {{os.getpid()}}\\n")
        time.sleep(0.4)
        return self.function(block)

torch.set_num_threads(1)
{start}
on = on_ray("auto", WORKERS)
label(
    lxt.load(llama(), a_tokenizer()),
    TEXTS,
    out={out!r},
    compute=lambda function, reading: on(Logged(function), reading),
    **OPTIONS,
)
ray.shutdown()
os._exit(0)  # a cluster that lost a node ends its driver with status 1
"""

ONE_NODE = 'ray.init(address="local", num_cpus=WORKERS, include_dashboard=False, object_store_memory=200 * 2**20)'
TWO_NODES = """
import threading
from ray.cluster_utils import Cluster
node = {{"num_cpus": 1, "object_store_memory": 150 * 2**20}}
soon = {{"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 3}}
cluster = Cluster(initialize_head=True, head_node_args=node | {{"_system_config": soon}})
second = cluster.add_node(**node)
ray.init(address=cluster.address, log_to_driver=False)

def lose():
    while not os.path.exists({gone!r}):
        time.sleep(0.02)
    cluster.remove_node(second, allow_graceful=False)

threading.Thread(target=lose, daemon=True).start()
"""


@pytest.fixture(scope="module")
def plain():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield label(lxt.load(llama(), a_tokenizer()), TEXTS, **OPTIONS)
    torch.set_num_threads(threads)


class Run:
    """The script in a process of its own."""

    def __init__(self, folder: Path, start: str = ONE_NODE):
        pytest.importorskip("ray")
        tests = Path(__file__).parent
        self.out, self.log, self.file = folder / "out", folder / "log", folder / "run.py"
        self.log.touch()
        paths = [str(tests), str(tests.parent)]
        self.file.write_text(SCRIPT.format(paths=paths, log=str(self.log), out=str(self.out), start=start))
        self.environment = os.environ | {"HOME": str(folder), "OMP_NUM_THREADS": "1"}

    def start(self):
        with open(self.file.with_suffix(".err"), "a") as errors:
            return subprocess.Popen([sys.executable, self.file], env=self.environment, stderr=errors)

    def computed(self):
        return [tuple(map(int, line.split())) for line in self.log.read_text().splitlines()]

    def wait_for(self, process, blocks):
        end = time.time() + 120
        while process.poll() is None and len(self.computed()) < blocks and time.time() < end:
            time.sleep(0.02)
        return self.computed()

    def wait_for_end_of_workers(self):
        end = time.time() + 60
        while any(is_running(worker) for _, worker in self.computed()) and time.time() < end:
            time.sleep(0.1)
        assert not any(is_running(worker) for _, worker in self.computed())


def is_running(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def assert_equal(out, plain):
    found, expected = lxt.neurons.load(out).tally.tensors(), plain.tally.tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_a_killed_driver_goes_on_and_killed_workers_change_nothing(plain, tmp_path):
    run = Run(tmp_path)
    process = run.start()
    run.wait_for(process, 5)
    process.kill()
    process.wait()
    stored = {int(path.stem.removeprefix("block-")) for path in run.out.glob("block-*")}
    run.wait_for_end_of_workers()  # Ray notices, and ends them
    before = [number for number, _ in run.computed()]
    assert len(before) == len(set(before))
    assert len(set(before) - stored) <= WORKERS  # what each had at hand

    process = run.start()
    killed = []
    for blocks in (2, 5):
        _, worker = run.wait_for(process, len(before) + blocks)[-1]
        os.kill(worker, signal.SIGKILL)
        killed.append(worker)
    assert process.wait(180) == 0
    assert_equal(run.out, plain)
    after = run.computed()[len(before) :]
    again = [number for number, _ in after]
    assert set(again) == set(range(BLOCKS)) - stored  # the lost ones, and those never begun
    assert len(again) <= len(set(again)) + len(killed)  # and what each killed worker had at hand
    assert len({worker for _, worker in after}) > WORKERS  # others took their places


@pytest.mark.slow
def test_a_lost_node_changes_nothing(plain, tmp_path):
    gone = tmp_path / "gone"
    run = Run(tmp_path, TWO_NODES.format(gone=str(gone)))
    process = run.start()
    run.wait_for(process, 5)
    gone.touch()
    assert process.wait(180) == 0
    assert_equal(run.out, plain)
    computed = [number for number, _ in run.computed()]
    assert set(computed) == set(range(BLOCKS))
    assert len(computed) <= BLOCKS + 1  # what the lost worker had at hand


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'lxt\[ray\]'"):
        on_ray()


def test_a_number_of_workers_is_checked():
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match="workers must be a whole number >= 1 or None, got 0"):
        on_ray(workers=0)
