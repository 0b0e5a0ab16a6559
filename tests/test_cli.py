"""Verbs as a user runs them: exit codes, one-line errors, what is written.

A process pays seconds of imports before its verb: what is not about the process calls the same function in this one.
"""

import contextlib
import csv
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dagman import cli
from dagman.cli import watching
from dagman.ct import phantom
from dagman.errors import ExitCode

TINY = (
    *("--encoder.embed-dim", "12", "--encoder.depths", "2,2,2,2", "--data.crop", "32,64,64"),
    *("--method.heads.num-prototypes", "64", "--method.heads.hidden-width", "64", "--optimisation.batch-size", "1"),
    *("--data.window-hu", "-1000,400"),
)


def dagman(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dagman", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


def called(*arguments: object) -> subprocess.CompletedProcess[str]:
    """What `dagman` ends with and says, without a process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.run(list(map(str, arguments)))
        except SystemExit as ended:  # a word that no verb has
            code = int(str(ended.code))
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms prepared and a tiny encoder pretrained on them."""
    folder = tmp_path_factory.mktemp("chain")
    table = phantom.write(folder / "phantoms", 12)
    assert dagman("prepare", "-i", table, "-o", folder / "prepared", "--workers", "1").returncode == 0
    trained = dagman(
        "pretrain", "dagman-tiny", *TINY, "--data", folder / "prepared", "-o", folder / "run", "--steps", "2"
    )
    assert trained.returncode == 0, trained.stderr
    assert "Next: dagman embed" in trained.stderr
    return folder


def test_help_names_every_verb_in_half_a_second_of_processor_time() -> None:
    def seconds() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times = []
    for _ in range(3):
        before = seconds()
        result = dagman("--help")
        times.append(seconds() - before)
    assert all(verb in result.stdout for verb in ("prepare", "check", "pretrain", "embed", "classify", "attention"))
    assert min(times) < 0.5


def test_help_imports_no_array_library() -> None:
    script = (
        "import sys\nfrom dagman.cli import run\nrun(['--help'])\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


def test_importing_dagman_imports_nothing_heavy() -> None:
    script = "import sys, dagman; print('torch' in sys.modules, 'numpy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("verb", "heavy"),
    [
        (("prepare", "-i", "{chain}/phantoms/images/phantom_000.nii.gz", "-o", "{tmp}/out"), "torch"),
        (("check", "{chain}/phantoms/images/phantom_000.nii.gz"), "torch"),
        (("classify", "probe", "-i", "{tmp}/features.csv", "-o", "{tmp}/out"), "torch"),
        (("compare", "{tmp}/one", "{tmp}/other"), "torch"),
        (("info", "dagman-tiny"), "lightning_fabric"),
    ],
)
def test_a_verb_waits_for_no_library_that_it_does_not_need(
    chain: Path, tmp_path: Path, verb: tuple[str, ...], heavy: str
) -> None:
    rows = ["case_id,patient,label,f0", *(f"c{index},p{index},{index % 2},{index**2 % 7}" for index in range(24))]
    (tmp_path / "features.csv").write_text("\n".join(rows) + "\n")
    if verb[0] == "compare":
        for place in ("one", "other"):
            assert called("classify", "probe", "-i", tmp_path / "features.csv", "-o", tmp_path / place).returncode == 0
    arguments = [word.format(chain=chain, tmp=tmp_path) for word in verb]
    script = f"import sys\nfrom dagman.cli import run\nprint(run({arguments!r}), {heavy!r} in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split()[-2:] == ["0", "False"], result.stderr


def test_every_public_name_resolves() -> None:
    import dagman as package

    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = package.nothing


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("prepre",), 2, "E-USAGE prepre: is not known; did you mean prepare?"),
        (("prepare", "-i", "{tmp}/nowhere", "-o", "{tmp}/out"), 2, "nowhere"),
        (("check",), 2, "was given no source"),
        (("check", "{tmp}"), 5, "0 scans can be used"),
        (("pretrain", "dagman-tinny", "--data", "{tmp}", "-o", "{tmp}/run"), 2, "did you mean dagman-tiny?"),
        (("ablate", "dagman-tiny", "--axis", "losses", "--data", "x", "-o", "y", "--sedes", "2"), 2, "mean --seeds?"),
        (
            ("pretrain", "dagman-tiny", "--data", "{tmp}", "-o", "{tmp}/run"),
            2,
            "no finished store: it holds no manifest.jsonl",
        ),
        (("pretrain", "dagman-tiny", "--data", "{tmp}", "-o", "{tmp}/r", "--method.loses.ampd", "0"), 2, "E-CONFIG"),
        (("pretrain", "dagman-tiny", "--data", "{tmp}", "-o", "{tmp}/r", "--method.losses.ampd"), 2, "has no value"),
        (("embed", "--weights", "{tmp}/none", "-i", "{tmp}", "-o", "{tmp}/f.csv"), 2, "none"),
    ],
)
def test_a_wrong_command_is_one_line_with_the_way_out(
    tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = called(*(word.format(tmp=tmp_path) for word in arguments))
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("E-") == (code == 2)


def test_a_process_ends_with_the_code_and_the_line(tmp_path: Path) -> None:
    result = dagman("info", tmp_path / "none")
    assert result.returncode == 2, result.stderr
    assert "is not known" in result.stderr
    assert "Traceback" not in result.stderr


def test_check_lists_scans_and_problems_and_writes_nothing(chain: Path, tmp_path: Path) -> None:
    shutil.copy(chain / "phantoms" / "images" / "phantom_000.nii.gz", tmp_path / "good.nii.gz")
    data = (tmp_path / "good.nii.gz").read_bytes()
    (tmp_path / "bad.nii.gz").write_bytes(data[: len(data) // 2])
    before = sorted(tmp_path.iterdir())
    result = called("check", tmp_path)
    assert result.returncode == 3
    assert result.stdout.startswith("good: nifti, 160x136x110 voxels of 2.2x2.2x2.5 mm")
    assert "E-GZIP" in result.stdout
    assert result.stderr.startswith("1 scan can be used; 1 problem; 0 notes\n")
    assert sorted(tmp_path.iterdir()) == before
    as_json = json.loads(called("check", tmp_path, "--json").stdout)
    assert [len(as_json[key]) for key in ("scans", "problems")] == [1, 1]


@pytest.mark.parametrize("buffered", ["0", "1"])
def test_whoever_stops_reading_ends_nothing_badly(chain: Path, buffered: str) -> None:
    """As in `dagman check SCANS | head -0`."""
    command = [sys.executable, "-m", "dagman", "check", str(chain / "phantoms" / "images")]
    environment = os.environ | {"PYTHONUNBUFFERED": buffered.replace("0", "")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as running:
        assert running.stdout is not None
        running.stdout.close()
        assert running.stderr is not None
        said = running.stderr.read().decode()
    assert running.returncode == 0, said
    assert "Pipe" not in said


def test_no_verb_imports_from_the_folder_it_is_called_in(tmp_path: Path) -> None:
    """A project has a `random.py` or `copy.py`: training starts anew, and must find Python's."""
    for name in ("random", "copy", "queue", "types"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from here')")
    script = Path(sys.executable).with_name("dagman")
    untuned = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    for begin in ([script, "check"], [script, "pretrain"], [sys.executable, "-P", "-m", "dagman", "pretrain"]):
        result = subprocess.run(
            [*begin, "nowhere"], cwd=tmp_path, capture_output=True, text=True, check=False, env=untuned
        )
        assert result.returncode == 2, result.stderr
        assert result.stderr.startswith("E-"), result.stderr


def test_what_to_run_next_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    watching.next_step("dagman prepare -i", Path("my scans"), Path("b"), "-o prepared")
    assert capsys.readouterr().err == "Next: dagman prepare -i 'my scans' b -o prepared\n"


def test_a_folder_with_other_things_is_no_place_for_a_store(tmp_path: Path) -> None:
    (tmp_path / "out" / "volumes").mkdir(parents=True)
    (tmp_path / "out" / "volumes" / "mine.npy").write_bytes(b"mine")
    (tmp_path / "scans").mkdir()
    result = called("prepare", "-i", tmp_path / "scans", "-o", tmp_path / "out")
    assert result.returncode == 4
    assert "holds other things (volumes)" in result.stderr
    assert (tmp_path / "out" / "volumes" / "mine.npy").exists()


def test_a_bad_scan_is_rejected_and_the_rest_goes_on(chain: Path, tmp_path: Path) -> None:
    sources = tmp_path / "scans"
    sources.mkdir()
    shutil.copy(chain / "phantoms" / "images" / "phantom_000.nii.gz", sources / "good.nii.gz")
    (sources / "bad.nii.gz").write_bytes((sources / "good.nii.gz").read_bytes()[:5000])
    result = called("prepare", "-i", sources, "-o", tmp_path / "prepared", "--workers", "1")
    assert result.returncode == 3
    assert "1 rejected (1 E-GZIP)" in result.stderr
    assert "Next: dagman pretrain" in result.stderr


def test_embed_probe_attention_export_and_info(chain: Path) -> None:
    features, probe = chain / "features.csv", chain / "probe"
    result = dagman("embed", "--weights", chain / "run", "-i", chain / "prepared", "-o", features, "--which", "all")
    assert result.returncode == 0, result.stderr
    assert f"12 cases, 288 features each; wrote {features} and {chain / 'features.json'}" in result.stderr
    some = ("embed", "--weights", chain / "run", "-i", chain / "prepared", "-o", features)
    assert called(*some, "--batch-size", "-1").returncode == 2
    assert called(*some[:-1], chain / "phantoms" / "cases.csv").returncode == 4
    result = called("classify", "probe", "-i", features, "-o", probe, "--positive", "malignant")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("auc")
    assert len((probe / "predictions.csv").read_text().splitlines()) == 13
    image, mask = (chain / "phantoms" / kind / "phantom_000.nii.gz" for kind in ("images", "masks"))
    result = called("attention", "--weights", chain / "run", "-i", image, "--mask", mask, "-o", chain / "attention")
    assert result.returncode == 0, result.stderr
    written = nib.load(chain / "attention" / "phantom_000_attention.nii.gz")
    assert written.shape == nib.load(image).shape
    assert np.array_equal(written.affine, nib.load(image).affine)
    assert (chain / "attention" / "phantom_000_attention.png").stat().st_size > 10_000
    result = called("export", "--to", "monai", "--weights", chain / "run", "-o", chain / "swin.safetensors")
    assert result.returncode == 0, result.stderr
    for thing, words in (
        ("dagman-swin", "epochs: 800"),
        (chain / "run", "run after 2 steps"),
        (chain / "prepared", "12 prepared cases of 9 patients, 12 with a label"),
        (chain / "swin.safetensors", "loaded"),
        (probe / "classifier", '"method": "linear probe"'),
    ):
        assert words in called("info", thing).stdout


def test_a_scheduler_stops_any_verb_as_ctrl_c_does(chain: Path, tmp_path: Path) -> None:
    command = ["embed", "--weights", chain / "run", "-i", chain / "prepared", "-o", tmp_path / "features.csv"]
    running = subprocess.Popen(
        [sys.executable, "-m", "dagman", *map(str, command)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    assert running.stderr is not None
    running.stderr.readline()  # what the encoder is: the work begins
    running.terminate()
    said = running.communicate(timeout=100)[1].decode()
    assert running.returncode == ExitCode.STOPPED, said
    assert said.endswith("stopped; run the same command again\n")
    assert not list(tmp_path.iterdir())


def test_a_probe_without_patients_is_refused(chain: Path, tmp_path: Path) -> None:
    features = tmp_path / "features.csv"
    rows = ["case_id,label,f0", *(f"c{index},{index % 2},{index}" for index in range(12))]
    features.write_text("\n".join(rows) + "\n")
    result = called("classify", "probe", "-i", features, "-o", tmp_path / "probe")
    assert result.returncode == 4
    assert "E-PATIENT" in result.stderr
    result = called("classify", "probe", "-i", features, "-o", tmp_path / "probe", "--group-by", "case")
    assert result.returncode == 0
    assert "not grouped by patient" in result.stderr


def test_a_finished_run_is_complete_and_changed_settings_are_refused(chain: Path, tmp_path: Path) -> None:
    common = ("pretrain", "dagman-tiny", *TINY, "--data", chain / "prepared", "-o", chain / "run")
    again = called(*common, "--steps", "2")
    assert again.returncode == 0
    assert "already complete" in again.stderr
    longer = called(*common, "--steps", "3")
    assert longer.returncode == 4
    assert "optimisation.steps: 2 -> 3" in longer.stderr
    before = called(*common, "--steps", "3", "--dry-run")
    assert before.returncode == 4
    assert before.stderr == longer.stderr
    assert "3 steps" in called(*common, "--steps", "3", "--dry-run", "--fresh").stderr
    inside = called(*common[:-1], chain, "--steps", "3", "--dry-run", "--fresh")
    assert inside.returncode == 4
    assert "which --fresh would move away" in inside.stderr
    left = called(*common, "--steps", "2", "--dry-run")
    assert left.returncode == 0
    assert f"12 volumes, the last 0 of 2 steps of the run in {chain / 'run'}" in left.stderr
    shutil.copytree(chain / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert "12 volumes, 2 steps;" in called(*common[:-1], tmp_path / "run", "--steps", "2", "--dry-run").stderr


def test_dry_run_says_what_it_would_cost_and_writes_nothing(chain: Path) -> None:
    result = called("pretrain", "dagman-tiny", "--data", chain / "prepared", "-o", chain / "never", "--dry-run")
    assert result.returncode == 0
    assert "12 volumes, 1000 steps; encoder 2.44 M parameters" in result.stderr
    assert "the paper's size" in result.stderr
    assert not (chain / "never").exists()


def test_a_setting_that_would_change_nothing_is_refused(chain: Path) -> None:
    given = ("pretrain", "smit-swin-tiny", "--data", chain / "prepared", "-o", chain / "never")
    result = called(*given, "--method.hidden.hint-ratio", "0.3")
    assert result.returncode == 2
    assert "E-CONFIG --method.hidden.hint-ratio: would change nothing: hiding is random; leave it out" in result.stderr
    assert not (chain / "never").exists()


def test_settings_come_from_yaml_and_flags_win(chain: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("optimisation: {learning_rate: 0.5, seed: 7}\n")
    result = called(
        *("pretrain", "dagman-tiny", "--data", chain / "prepared", "-o", tmp_path / "run", "-c", path, "--dry-run"),
        *("--optimisation.learning-rate=0.25",),
    )
    assert "learning_rate: 0.25" in result.stdout
    assert "seed: 7" in result.stdout
    path.write_text("optimisation: {steps: 1000, epochs: null}\n")
    given = ("pretrain", "dagman-tiny", "--data", chain / "prepared", "-o", tmp_path / "run", "-c", path, "--dry-run")
    assert " 1000 steps; " in called(*given).stderr
    assert " 5 steps; " in called(*given, "--steps", "5").stderr
    assert "epochs: 5\n" in (told := called(*given, "--epochs", "5").stdout)
    assert "steps: null\n" in told


def test_the_python_of_the_readme_runs(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    block = text.split("```python\n")[1].split("```")[0]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(chain / "run")
    (tmp_path / "prepared").symlink_to(chain / "prepared")
    monkeypatch.chdir(tmp_path)
    result = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert 0 <= float(result.stdout.split()[0]) <= 1


@pytest.fixture(scope="module")
def near_nodules(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantoms cut to 18 cm around their nodules, and their table: the demo looks at whole scans."""
    folder = tmp_path_factory.mktemp("near")
    table = (chain / "phantoms" / "cases.csv").read_text()
    for row in csv.DictReader(table.splitlines()):
        mask = nib.load(chain / "phantoms" / row["mask"])
        centre = np.argwhere(mask.get_fdata()).mean(axis=0)
        first = np.clip(centre - 40, 0, np.maximum(np.array(mask.shape) - 80, 0)).astype(int)
        box = tuple(slice(start, start + 80) for start in first)
        for name in (row["image"], row["mask"]):
            (folder / name).parent.mkdir(exist_ok=True)
            nib.save(nib.load(chain / "phantoms" / name).slicer[box], folder / name)
    (folder / "cases.csv").write_text(table)
    return folder


@pytest.fixture
def few_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight crops are examined after the one step of a demo, where 64 would be most of its work."""
    monkeypatch.setattr("dagman.train.pretrain.EXAMINED", 8)


@pytest.mark.usefixtures("few_examined")
def test_the_demo_on_labelled_scans_prints_its_table_and_continues(near_nodules: Path, tmp_path: Path) -> None:
    command = ("demo", "-o", tmp_path / "demo", "--data", near_nodules / "cases.csv", "--steps", "1")
    result = called(*command)
    assert result.returncode == 0, result.stderr
    for words in (
        "raw voxels",
        "pretrained minus this",
        "image error relative",
        "docs/learning.md",
        "dagman pretrain dagman-tiny",
    ):
        assert words in result.stderr
    found = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert [row["features"] for row in found["probe"]] == ["pretrained", "untrained", "raw voxels"]
    assert len(list((tmp_path / "demo" / "attention").glob("*.png"))) == 2
    assert "already complete" in called(*command).stderr
    other = called("demo", "-o", tmp_path / "demo", "--data", near_nodules / "images", "--steps", "1")
    assert other.returncode == 4
    assert "holds a demo on other scans" in other.stderr


@pytest.mark.usefixtures("few_examined")
def test_the_demo_goes_as_far_as_labels_do(near_nodules: Path, tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.nii.gz").symlink_to(near_nodules / "images" / "phantom_000.nii.gz")
    result = called("demo", "-o", tmp_path / "demo", "--data", tmp_path / "scans", "--steps", "1")
    assert result.returncode == 0, result.stderr
    assert "no probe: 0 classes of labels" in result.stderr
