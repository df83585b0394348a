"""The man page and shell completion are made of the command line itself (scripts/manual)."""

import subprocess
from pathlib import Path

import pytest

pytest.importorskip("shtab", reason="of the dev extra, which only the main Python has: scripts/manual needs it")
TOP = Path(__file__).parents[2]


def test_man_page_and_completion(tmp_path: Path) -> None:
    subprocess.run([TOP / "scripts/manual", tmp_path], check=True, cwd=TOP, timeout=120)
    share = tmp_path / "share"
    page = (share / "man/man1/vfiouser-virtio.1").read_text()
    assert page.startswith(".TH VFIOUSER\\-VIRTIO")
    assert all(command in page for command in ("serve", "run", "qemu\\-args", "probe", "conform"))
    script = share / "bash-completion/completions/vfiouser-virtio"
    lines = "COMP_WORDS=(vfiouser-virtio serve --proc); COMP_CWORD=2; _shtab_vfiouser_virtio; echo ${COMPREPLY[@]}"
    completed = subprocess.run(["bash", "-c", f"source {script}; {lines}"], check=True, capture_output=True, text=True)
    assert completed.stdout.split() == ["--processes"]
    assert "--processes" in (share / "zsh/site-functions/_vfiouser-virtio").read_text()
