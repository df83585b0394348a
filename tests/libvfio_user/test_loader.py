"""Where the library is looked for, and what is refused, each with one line that says why."""

import ctypes
import errno
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.libvfio_user_double import Double

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.libvfio_user.bindings import ENVIRONMENT, PROTOTYPES, Library, library, load
from vfiouser_virtio.libvfio_user.bindings.probe import probe
from vfiouser_virtio.libvfio_user.bindings.types import DMA_CB

LIBC = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libc.so" in line)


def refusal(path: str | Path | None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def compile_stub(tmp_path: Path) -> Any:
    """Makes a shared object of some C."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")

    def compile_stub(source: str) -> Path:
        path = tmp_path / "libvfio-user.so"
        subprocess.run(
            ["cc", "-w", "-shared", "-fPIC", "-o", str(path), "-x", "c", "-"], input=source.encode(), check=True
        )
        return path

    return compile_stub


def stubs(**own: str) -> str:
    """C of all functions; they do nothing but for ``own``."""
    bodies = (own.get(name, f"long {name}(void) {{ return 0; }}\n") for name in PROTOTYPES)
    return "#include <errno.h>\n" + "".join(bodies)


def test_no_such_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.so") == f"libvfio-user: there is no {tmp_path}/none.so"


def test_a_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"libvfio-user: {tmp_path} is a folder; name the libvfio-user.so in it"


def test_no_shared_object(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("not ELF")
    assert refusal(tmp_path / "text.so").startswith(f"libvfio-user: {tmp_path}/text.so: ")


def test_another_library() -> None:
    assert refusal(LIBC) == f"{LIBC} is not libvfio-user: it has no vfu_create_ctx"


def test_functions_are_missing(compile_stub: Any) -> None:
    path = compile_stub("void *vfu_create_ctx(void) { return 0; }")
    unknown = rf"{path} is a libvfio-user that is not known here"
    assert re.fullmatch(rf"{unknown}: it has no dma_sg_size, .*vfu_create_ioeventfd", refusal(path))


def test_no_size_of_an_entry(compile_stub: Any) -> None:
    path = compile_stub(stubs())
    assert refusal(path).endswith("its dma_sg_size() says 0, which is no size of a dma_sg_t")


def test_no_context(compile_stub: Any) -> None:
    path = compile_stub(
        stubs(
            dma_sg_size="long dma_sg_size(void) { return 40; }\n",
            vfu_create_ctx="void *vfu_create_ctx(void) { errno = ENOTSUP; return 0; }\n",
        )
    )
    assert refusal(path).endswith(f"its vfu_create_ctx fails: {os.strerror(errno.ENOTSUP)}")


def test_a_file_that_is_named_is_not_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "by-environment"))
    assert "by-environment" in refusal(None)
    assert "by-argument" in refusal(tmp_path / "by-argument")


def test_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setattr(library, "SONAMES", ("libvfio-user-is-not-here.so.0",))
    message = refusal(None)
    assert "--libvfio-user" in message
    assert ENVIRONMENT in message


def test_the_library_is_found(libvfio_user: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if "/" not in libvfio_user.path:
        pytest.skip("found by the loader, not as a file")
    again = tmp_path / "elsewhere.so"
    again.symlink_to(os.path.abspath(libvfio_user.path))
    monkeypatch.setenv(ENVIRONMENT, str(again))
    assert load().path == str(again)
    assert load(libvfio_user.path).version == libvfio_user.version
    # What has been loaded is found by its soname.
    monkeypatch.delenv(ENVIRONMENT)
    assert load().path in library.SONAMES


def test_older_builds_are_refused() -> None:
    """LIBVFIO_USER_OLDER: files from before 8b1396b, separated by colons."""
    older = os.environ.get("LIBVFIO_USER_OLDER")
    if not older:
        pytest.skip("LIBVFIO_USER_OLDER names no older builds")
    for path in older.split(":"):
        assert "older than commit" in refusal(path)


# --- What the probe sees --------------------------------------------------------------------------------------------


def test_a_version_that_is_known() -> None:
    assert probe(Double().functions).startswith("libvfio-user 5d64ebf or later")


def test_a_version_without_direct_access() -> None:
    functions = Double().functions

    def read(handle: int, entries: Any, count: int, data: Any, flags: int) -> int:
        ctypes.set_errno(errno.EINVAL if flags else errno.ENOTSUP)
        return -1

    functions.vfu_sgl_read = read
    assert probe(functions).startswith("libvfio-user 8b1396b to 5d64ebf")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOTSUP, "older than commit 8b1396b of April 2026: its vfu_sgl_read takes no flags"),
        (errno.EPERM, "answers as no known version does"),
    ],
)
def test_lists_without_flags(number: int, message: str) -> None:
    functions = Double().functions

    def read(handle: int, entries: Any, count: int, data: Any, flags: int) -> int:
        ctypes.set_errno(number)
        return -1

    functions.vfu_sgl_read = read
    with pytest.raises(ConfigError, match=message):
        probe(functions)


def test_regions_without_a_limit() -> None:
    functions = Double().functions
    current = functions.vfu_setup_device_dma
    # The C function of that time takes what now is max_regions for its first callback, and the next for its second.
    functions.vfu_setup_device_dma = lambda handle, first, second, third: current(handle, 64, DMA_CB(first), second)
    with pytest.raises(ConfigError, match="older than commit f3742ed of March 2026"):
        probe(functions)


def test_callbacks_that_are_never_called() -> None:
    functions = Double().functions
    functions.vfu_setup_device_dma = lambda handle, first, second, third: 0
    with pytest.raises(ConfigError, match="sets no callback up"):
        probe(functions)


def test_a_struct_that_is_laid_out_otherwise() -> None:
    functions = Double().functions
    current = functions.vfu_setup_device_dma
    kept = []

    def setup(handle: int, limit: int, register: Any, unregister: Any) -> int:
        def shifted(context: int, info: Any) -> None:
            info.contents.prot = 0x5000_0000
            register(context, info)

        kept.append(DMA_CB(shifted))
        return current(handle, limit, kept[0], unregister)

    functions.vfu_setup_device_dma = setup
    with pytest.raises(ConfigError, match="no known version says"):
        probe(functions)


def test_the_probe_leaves_nothing_behind(
    libvfio_user: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    probe(libvfio_user.functions)
    probe(Double().functions)
    assert len(os.listdir("/proc/self/fd")) == before
    assert list(tmp_path.iterdir()) == []
