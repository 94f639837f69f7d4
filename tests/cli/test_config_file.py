"""Settings in a file: written by every run, read by `--config`, overridden by flags."""

import os

import pytest
import yaml

from sparse_expansion.cli import main
from sparse_expansion.cli.parser import parse_arguments
from sparse_expansion.cli.settings import execution_options, run_config
from sparse_expansion.config.values import RUN_SECTIONS, plain_values
from sparse_expansion.settings_file import MOST_BYTES, read_settings, settings_text
from tests.tiny import digests


def written(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def parse(*flags):
    return parse_arguments(flags)


def test_a_run_is_done_again_from_its_file(measured_run, tmp_path, monkeypatch):
    """From another folder, and with nothing but the file."""
    monkeypatch.chdir(tmp_path)
    path = str(measured_run / "run.yaml")
    assert main(["run", "--config", path, "--output", "again"]) == 0
    assert digests(tmp_path / "again") == digests(measured_run) != {}
    # The file of the second run asks for the same.
    assert (tmp_path / "again" / "run.yaml").read_text() == (measured_run / "run.yaml").read_text()


def test_the_file_has_every_setting(measured_run):
    found = read_settings(measured_run / "run.yaml")
    config = run_config(parse("run", "--config", str(measured_run / "run.yaml")), found["seqlen"])
    assert {**found, **plain_values(config), "dataset": found["dataset"]} == found
    assert found["threads"] == 1 and found["eval_windows"] == 2 and "num_workers" not in found


def test_flags_override_the_file(tmp_path):
    path = written(
        tmp_path,
        "model: m\nnum-clusters: 4\nSparsity: 2:4\nquantize: true\nbits: 3\nthreads: 2\n"
        "pca_reduction_factor: null\nactivation-memory: 3GiB\ndataset_size: all\neval_windows: 5\n",
    )
    args = parse("run", "--config", path)
    config = run_config(args, 64)
    assert args.model == "m" and args.eval_windows == 5 and args.quantize is True
    assert str(config.compression.sparsity) == "2:4" and config.compression.bits == 3
    assert config.routing.num_clusters == 4 and config.routing.pca_reduction_factor is None
    assert config.calibration.whole_text and config.calibration.seqlen == 64
    assert execution_options(args).activation_bytes == 3 << 30
    # What the file does not say is the preset's, as with flags.
    assert config.compression.damping_fraction == 0.2
    args = parse("run", "--config", path, "--num_clusters", "8", "-s", "0.7", "--model=n")
    config = run_config(args, 64)
    assert args.model == "n" and config.routing.num_clusters == 8
    assert config.compression.sparsity.fraction == 0.7


def test_presets_in_and_over_a_file(tmp_path):
    path = written(tmp_path, "model: m\npreset: paper\n")
    assert run_config(parse("run", "--config", path), 64).compression.pruner == "sparsegpt"
    config = run_config(parse("run", "--config", path, "--preset", "best"), 64)
    assert config.compression.pruner == "admm"
    # The file of a run names all that presets are about, and a preset flag overrides it.
    whole = written(tmp_path, settings_text({"model": "m", **plain_values(config)}))
    assert run_config(parse("run", "--config", whole), 64) == config
    paper = run_config(parse("run", "--config", whole, "--preset", "paper"), 64)
    assert paper == run_config(parse("run", "--model", "m", "--preset", "paper"), 64)


def test_other_commands_take_what_they_have_flags_of(tmp_path):
    path = written(tmp_path, "model: m\ndataset: pydoc\nnum_clusters: 4\nseqlen: 48\noutput: o\n")
    args = parse("evaluate", "--config", path, "--model", "expanded")
    assert (args.model, args.dataset, args.seqlen) == ("expanded", "pydoc", 48)
    assert run_config(parse("plan", "--config", path), 48).routing.num_clusters == 4
    assert parse("expand", "--config", path).output == "o"


def test_shares_by_block_and_small_numbers_come_back(tmp_path):
    values = {"layer_sparsity": [0.4, 0.6], "damping_fraction": 1e-5, "sparsity": 0.123456789012}
    found = read_settings(written(tmp_path, settings_text(values)))
    assert found == values
    args = parse("run", "--model", "m", "--config", written(tmp_path, settings_text(values)))
    assert args.layer_sparsity == (0.4, 0.6) and args.sparsity.fraction == 0.123456789012


def test_words_are_what_they_seem(tmp_path):
    text = "a: no\nb: 2:4\nc: 1e-3\nd: 2020-01-01\ne: ~\nf: True\ng: 010\nh: 1_0\ni: -3\nj: .5\n"
    found = read_settings(written(tmp_path, text))
    plain = {"a": "no", "b": "2:4", "c": 0.001, "d": "2020-01-01", "e": None, "f": True}
    # With a zero in front it is no whole number, and certainly not the 8 of base 8.
    assert found == plain | {"g": 10.0, "h": "1_0", "i": -3, "j": 0.5}
    assert read_settings(written(tmp_path, "")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_cluster: 4", "setting 'num_cluster' is unknown (did you mean num_clusters?)"),
        ("num_clusters: many", "num_clusters 'many' must be a whole number"),
        ("quantize: 1", "quantize 1 must be true or false"),
        ("preset: bset", "preset 'bset' is none of paper, best (did you mean best?)"),
        ("pruner: [1]", "pruner [1] is none of"),
        ("sparsity: 3", "sparsity 3.0 is outside 0 to 1"),
        ("eval_windows: 1.5", "eval_windows 1.5 must be a whole number"),
        ("- a\n- b", "holds no mapping"),
        ("just words", "holds no mapping"),
        ("3: 4", "3 is no name of a setting"),
        ("a: {b: c}", "a is neither a plain value nor a list of numbers"),
        ("a: [[1]]", "a is neither a plain value"),
        ("a: 1\na: 2", "it has 'a' twice"),
        ("num_clusters: 1\nnum-clusters: 2", "has 'num-clusters' twice"),
        ("a: &x [1, 2]\nb: *x", "it has an alias"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: [1, 2", "is no YAML file of settings"),
        ("? [a]\n: b", "is no YAML file of settings: found unhashable key"),
        pytest.param("a: " + "[" * 100_000, "nested too deeply, line 1", id="brackets"),
        pytest.param("- " * 60_000, "cannot be read", id="dashes"),
        pytest.param("a: " + "9" * 9000, "cannot be read", id="digits"),
        ("a: \x1b[2J", "it has characters that no text has"),
        pytest.param("x" * (MOST_BYTES + 1), "no such file has more than", id="size"),
    ],
)
def test_a_wrong_file_is_one_line_and_exit_2(text, message, tmp_path, capsys):
    assert main(["run", "--model", "m", "--config", written(tmp_path, text)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and "\x1b" not in line


def test_what_is_no_file(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"a: \xff\xfe")
    for name, message in {
        "pipe": "is a named pipe and not a file",
        ".": "is a folder and not a file",
        "none.yaml": "does not exist",
        "bytes": "is not UTF-8 text",
    }.items():
        assert main(["run", "--model", "m", "--config", str(tmp_path / name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert main(["run", "--model", "m", "--config"]) == 2
    assert "expected one argument" in capsys.readouterr().err
    assert main(["report", "x", "--config", "y"]) == 2
    assert "unrecognized arguments: --config y" in capsys.readouterr().err


def test_sections_have_no_name_in_common():
    names = [name for section in RUN_SECTIONS for name in plain_names(section)]
    assert len(names) == len(set(names))


def plain_names(section):
    from sparse_expansion.config.fields import settings_of

    return [name for name, spec in settings_of(section).items() if spec.flag]


def test_the_written_file_is_plain_yaml():
    text = settings_text({"model": "no", "sparsity": "2:4", "bits": None, "shares": [0.1]})
    assert yaml.safe_load(text) == {"model": "no", "sparsity": "2:4", "bits": None, "shares": [0.1]}
