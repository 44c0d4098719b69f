"""What every test runs under: one thread, no network, no hub, and global torch state that stays as it was."""

import gc
import ipaddress
import os
import shutil
import socket

import hypothesis
import pytest
import torch

import checked_annotations  # noqa: F401  before anything imports the package

# On a busy machine with few cores a tiny forward is a hundred times faster on one thread.
torch.set_num_threads(1)
# Read once, when huggingface_hub is imported, which nothing above does. Child processes inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"

# No deadline: the first example of a property pays for imports and caches. In CI the examples are fixed, so
# that a failure there is about the commit.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_finish():
    """statsmodels collects garbage at every adjustment of p: let it look past what the imports brought."""
    gc.freeze()


CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")


def _refuse_network(address) -> None:
    """Raise unless the address is a Unix socket's or loopback's.

    A RuntimeError, because code that goes on without its download catches OSError.
    """
    if not isinstance(address, tuple):
        return  # a Unix socket: asyncio and playwright talk through them
    host = address[0]
    if host in ("localhost", ""):
        return
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise RuntimeError(f"A test opened a connection to {host!r}. Tests run without a network.")


def _guarded(method):
    def call(self, *args):
        _refuse_network(args[-1])  # connect(address), connect_ex(address), sendto(data, [flags,] address)
        return method(self, *args)

    return call


def _guarded_lookup(host, *args, _lookup=socket.getaddrinfo, **kwargs):
    if host is not None:
        _refuse_network((host.decode() if isinstance(host, bytes) else host,))
    return _lookup(host, *args, **kwargs)


for _name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, _name, _guarded(getattr(socket.socket, _name)))
socket.getaddrinfo = _guarded_lookup


def torch_state() -> dict:
    """The global switches of torch that a method could leave changed."""
    cuda = torch.backends.cuda
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "flash attention": cuda.flash_sdp_enabled(),
        "efficient attention": cuda.mem_efficient_sdp_enabled(),
        "math attention": cuda.math_sdp_enabled(),
    }


@pytest.fixture(autouse=True)
def unchanged_torch_state():
    """Fails a test that leaves a global switch of torch changed."""
    before = torch_state()
    yield
    after = torch_state()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    # Put back what other tests would fail by, so that only the culprit does.
    torch.set_grad_enabled(before["grad mode"])
    torch.set_default_dtype(before["default dtype"])
    torch.set_num_threads(before["threads"])
    assert not changed, f"global torch state changed (before, after): {changed}"


@pytest.fixture(scope="session")
def demo():
    """The embedded reward model; its first load on a machine merges and caches the weights."""
    import reward_lens

    return reward_lens.load("demo")


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium for playwright's `executable_path`. Missing: a failure in CI, a skip elsewhere."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        message = f"No Chromium on this machine: none of {', '.join(CHROMIUM)} is on the path."
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


@pytest.fixture(scope="module")
def browser(chromium):
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    from browsing import LAUNCH

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=[*LAUNCH, "--no-first-run"])
        yield opened
        opened.close()
