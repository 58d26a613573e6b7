"""The command line as a user meets it: exit codes, one-line errors, quiet, JSON, Ctrl-C, full disks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from octoc.cli import run

OCTOC = [sys.executable, "-m", "octoc"]
DEVICE = "raspberry-pi-5"
PATIENCE = 600  # seconds for a child on a busy machine, before it counts as stuck


class Work:
    """A small network, data that it answers rightly, and one finished run of `octoc compress --json`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        torch.manual_seed(0)
        layers = (nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
        network = nn.Sequential(*layers).eval()
        x = torch.randn(80, 1, 8, 8)
        batch = {0: torch.export.Dim("batch")}
        program = torch.export.export(network, (x[:2],), dynamic_shapes=({**batch},))
        self.model, self.data = folder / "net.pt2", folder / "data.npz"
        torch.export.save(program, self.model)
        with torch.no_grad():
            np.savez(self.data, x=x.numpy(), y=network(x).argmax(1).numpy())
        self.done = octoc(*self.arguments(out=self.out), "--max-drop", "1", "--json")
        self.artifact = self.out / DEVICE / "onnx" / "model.onnx"

    def arguments(self, **changed: Any) -> list[str]:
        given = {"model": self.model, "data": self.data, "device": DEVICE, "out": self.folder / "bad"} | changed
        model = given.pop("model")
        return ["compress", str(model), *(text for key, value in given.items() for text in (f"--{key}", str(value)))]


def octoc(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*OCTOC, *arguments], capture_output=True, text=True, timeout=PATIENCE, **options)


def prepared(first: str, arguments: list[str]) -> subprocess.Popen[str]:
    """A child that runs a line of Python before it becomes octoc.

    `preexec_fn` would do that too, but it runs the fork hooks of every library that the test process has loaded.
    """
    become = f"{first}\nimport os, sys\nos.execv(sys.executable, sys.argv[1:])"
    command = [sys.executable, "-c", become, *OCTOC, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(tmp_path_factory.mktemp("cli"))


def one_line(text: str) -> str:
    """Checks that an error is one line, without a traceback, and gives what it says."""
    assert text.startswith("error: "), text
    assert text.count("\n") == 1, text
    assert "internal" not in text
    return text


def failure(capfd: pytest.CaptureFixture[str], arguments: list[str], code: int) -> str:
    """Runs a command line that must fail with a code, silent on stdout and with one line on stderr."""
    assert run(arguments) == code
    captured = capfd.readouterr()
    assert captured.out == ""
    return one_line(captured.err)


@pytest.mark.parametrize("command", ["", "compress", "devices", "inspect", "verify", "demo"])
def test_help_imports_nothing_heavy(command: str) -> None:
    found = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "octoc", *command.split(), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.removeprefix("import time:").split("|") for line in found.stderr.splitlines()[1:]]
    imported = {row[2].strip().split(".")[0] for row in rows}
    assert not imported & {"torch", "numpy", "rich", "yaml", "onnx", "coremltools"}
    # 0.25 s on a quiet machine; a busy one is given some room
    assert sum(int(row[0]) for row in rows) < 500_000


def test_the_help_documents_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n    {code}  " in text for code in range(5))


def test_a_run_ends_with_0_and_json_alone_on_stdout(work: Work) -> None:
    assert work.done.returncode == 0, work.done.stderr
    assert work.done.stderr == ""  # no terminal, no bars; and libraries are held silent
    assert json.loads(work.done.stdout) == json.loads((work.out / "report.json").read_text())
    names = {path.name for path in work.artifact.parent.iterdir()}
    assert names == {"model.onnx", "recipe.json", "proof.safetensors"}


def test_nothing_temporary_stays_after_a_run(work: Work) -> None:
    kept = {DEVICE, "report.html", "report.json", "sensitivity.json"}
    assert {path.name for path in work.out.iterdir()} == kept


def test_a_recipe_rebuilds_the_same_bytes_and_quiet_says_nothing(work: Work) -> None:
    again = work.folder / "again"
    recipe = str(work.artifact.parent / "recipe.json")
    found = octoc(*work.arguments(out=again), "--recipe", recipe, "-q")
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    assert (again / DEVICE / "onnx" / "model.onnx").read_bytes() == work.artifact.read_bytes()


def test_verify_prints_a_line_for_each_check(work: Work, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(work.artifact)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["ok    codes", "ok    outputs", "ok    unchanged"]


def test_a_flipped_byte_makes_verify_exit_with_3(work: Work, capfd: pytest.CaptureFixture[str]) -> None:
    damaged = bytearray(work.artifact.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (work.folder / "damaged.onnx").write_bytes(damaged)
    proof = work.artifact.parent / "proof.safetensors"
    assert run(["verify", str(work.folder / "damaged.onnx"), "--proof", str(proof), "-q"]) == 3
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "damaged.onnx is not what was proven" in one_line(captured.err)


def test_an_impossible_budget_exits_with_1_and_names_the_smallest_size(
    work: Work, capfd: pytest.CaptureFixture[str]
) -> None:
    out = work.folder / "tight"
    text = failure(capfd, [*work.arguments(out=out), "--max-size", "1kB", "-q"], 1)
    assert "smallest reachable" in text
    assert (out / "report.json").exists()


def test_a_dry_run_writes_nothing(work: Work, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*work.arguments(), "--dry-run", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["artifacts"][0]["path"] is None
    assert not (work.folder / "bad").exists()


def test_a_dry_run_needs_no_folder_and_a_run_does(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [text for text in work.arguments() if text not in ("--out", str(work.folder / "bad"))]
    assert run([*arguments, "--dry-run", "-q"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert "--out" in failure(capfd, arguments, 2)


@pytest.mark.parametrize(
    "option",
    ["--weights int4", "--activations int8", "--sparsity 0.5", "--rank 0.5", "--seed 7", "--device iphone-15-pro"],
)
def test_what_a_recipe_decides_or_a_device_does_not_run_is_refused_beside_it(
    work: Work, option: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = (work.artifact.parent / "recipe.json").read_text()
    (tmp_path / "recipe.json").write_text(text.replace('"onnx"', '"coreml"') if "device" in option else text)
    arguments = [*work.arguments(), "--recipe", str(tmp_path / "recipe.json"), *option.split()]
    wanted = f"{DEVICE} does not run coreml" if "device" in option else f"{option} beside --recipe"
    assert wanted in failure(capfd, arguments, 2)
    assert "--recipe" in failure(capfd, [*work.arguments(), "--recompute"], 2)


def test_inspect_json_counts_what_torch_counts(work: Work, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(work.model), "--device", "pixel-8", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [layer["weights"] for layer in found["layers"]] == [8 * 9, 8 * 36 * 10]
    assert found["macs"] == 36 * 8 * 9 + 8 * 36 * 10
    assert found["inputs"][0]["shape"] == [None, 1, 8, 8]


def test_inspect_of_a_factory_takes_shapes(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "octoc.demo.network:digits", "--input-shape", "1,1,8,8"]) == 0
    assert "stem.0.weight" in capfd.readouterr().out
    failure(capfd, ["inspect", "octoc.demo.network:digits"], 2)
    failure(capfd, ["inspect", "octoc.demo.network:digits", "--input-shape", "1,-1"], 2)


def test_devices_are_listed_and_shown_with_their_sources(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["devices"]) == 0
    assert DEVICE in capfd.readouterr().out
    assert run(["devices", "iphone-15-pro"]) == 0
    assert "Neural Engine" in capfd.readouterr().out
    assert run(["devices", DEVICE, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["id"] == DEVICE


def test_bad_models_exit_with_3(work: Work, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    truncated, random, empty = tmp_path / "short.pt2", tmp_path / "random.pt2", tmp_path / "empty.pt2"
    truncated.write_bytes(work.model.read_bytes()[:1000])
    random.write_bytes(np.random.default_rng(0).bytes(5000))
    empty.write_bytes(b"")
    for path in (tmp_path / "missing.pt2", truncated, random, empty):
        assert path.name in failure(capfd, work.arguments(model=path), 3)
    assert not (work.folder / "bad").exists()


def test_weights_that_are_nan_exit_with_3(work: Work, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from octoc.demo.network import digits

    state = digits().state_dict()
    state["head.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    arguments = work.arguments(model="octoc.demo.network:digits")
    assert "head.weight" in failure(capfd, [*arguments, "--weights-file", str(tmp_path / "nan.pt")], 3)


def test_bad_data_exits_with_3(work: Work, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    x = np.zeros((20, 1, 8, 8), np.float32)
    bad = {"shape": x[:, :, :5], "text": np.full(20, "a"), "nan": x + np.float32("nan"), "empty": x[:0]}
    for name, array in bad.items():
        np.savez(tmp_path / f"{name}.npz", x=array)
        assert name in failure(capfd, work.arguments(data=tmp_path / f"{name}.npz"), 3)
    (tmp_path / "random.npz").write_bytes(b"no archive")
    for name in ("random.npz", "missing.npz"):
        assert name in failure(capfd, work.arguments(data=tmp_path / name), 3)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"device": "raspbery-pi5"}, "raspberry-pi-5"),
        ({"max-size": "0"}, "150kB"),
        ({"max-size": "many"}, "150kB"),
        ({"max-drop": "-1"}, "1%"),
        ({"format": "gguf"}, "onnx"),
        ({"format": "coreml"}, "onnx, tflite"),
        ({"weights": "int9"}, "int9"),
        ({"sparsity": "1.5"}, "between 0 and 1"),
        ({"metric": "f2"}, "top1"),
        ({"devices-file": "missing.yaml"}, "missing.yaml"),
        ({"maxsize": "3"}, "--max-size"),
        ({"weights": "int5"}, "they run float16, int8, int4"),
        ({"weights": "palette4"}, "raspberry-pi-5 onnx run no such weights"),
    ],
)
def test_what_cannot_be_meant_exits_with_2_and_a_hint(
    work: Work, options: dict[str, str], hint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert hint in failure(capfd, work.arguments(**options), 2)


def test_an_unknown_command_is_answered_with_the_nearest(capfd: pytest.CaptureFixture[str]) -> None:
    assert "compress" in failure(capfd, ["compres"], 2)


def test_an_output_folder_that_cannot_be_made_exits_with_4(work: Work, capfd: pytest.CaptureFixture[str]) -> None:
    for out in (work.data / "out", work.data):  # a file where a folder is due
        assert "--out" in failure(capfd, work.arguments(out=out), 4)


def test_a_disk_that_takes_no_more_exits_with_4_and_leaves_nothing(work: Work) -> None:
    out = work.folder / "full"
    found = prepared("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))", work.arguments(out=out))
    _, stderr = found.communicate(timeout=PATIENCE)
    assert found.returncode == 4, stderr
    assert "File too large" in one_line(stderr)
    assert not out.exists()


def test_full_stdout_exits_with_4(capfd: pytest.CaptureFixture[str]) -> None:
    with Path("/dev/full").open("w") as full:
        found = subprocess.run([*OCTOC, "devices"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert found.returncode == 4
    assert "No space left" in one_line(found.stderr)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    found = subprocess.run(
        f"{sys.executable} -m octoc devices --json | head -c 1", shell=True, capture_output=True, text=True
    )
    assert (found.stdout, found.stderr) == ("[", "")


def unread(*arguments: str) -> tuple[int, str]:
    """Exit code and stderr of a command whose reader has left before it says anything."""
    end, start = os.pipe()
    os.close(end)
    found = subprocess.run([*OCTOC, *arguments], stdout=start, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    os.close(start)
    return found.returncode, found.stderr


@pytest.mark.parametrize("command", ["devices", "devices --json", "devices raspberry-pi-5", "--help"])
def test_without_a_reader_a_command_ends_with_0_and_says_nothing(command: str) -> None:
    assert unread(*command.split()) == (0, "")


def test_without_a_reader_a_run_still_ends_as_it_went(work: Work) -> None:
    assert unread(*work.arguments(), "--dry-run") == (0, "")
    code, said = unread(*work.arguments(), "--dry-run", "--max-size", "1kB")
    assert code == 1
    assert "goal missed" in one_line(said)
    assert unread("verify", str(work.artifact)) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_exits_with_4_and_leaves_nothing_half_written(work: Work, number: signal.Signals) -> None:
    out = work.folder / f"stopped-{number.name}"
    # a shell that runs the tests in the background would have them inherit a deaf ear
    process = prepared("import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)", work.arguments(out=out))
    try:
        deadline = time.monotonic() + PATIENCE
        while not list(out.glob(".octoc-*")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 4, stderr
    assert stdout == ""
    assert one_line(stderr) == f"error: interrupted; nothing half-written was left in {out}\n"
    assert not out.exists()


def test_a_terminal_gets_progress_bars(work: Work) -> None:
    import pty

    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [*OCTOC, *work.arguments(out=work.folder / "bars"), "--dry-run", "--json"],
        stdout=subprocess.PIPE,
        stderr=end,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(end)
    shown = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        shown += piece
    os.close(terminal)
    assert process.wait() == 0
    assert b"Counting the original" in shown or b"Loading the network" in shown
    assert process.stdout is not None
    json.loads(process.stdout.read())
    process.stdout.close()


def test_an_error_of_ours_shows_its_place_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(extra: Any = None) -> Any:
        raise TypeError("no such thing")

    monkeypatch.setattr("octoc.device.load_devices", broken)
    assert run(["devices"]) == 3
    assert capfd.readouterr().err == "error: internal: TypeError: no such thing (run with --traceback to see where)\n"
    assert run(["devices", "--traceback"]) == 3
    assert "Traceback" in capfd.readouterr().err
