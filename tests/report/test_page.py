"""The report as a page: what it says, what it must not contain, and how a browser shows it."""

import html
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_expansion.cli import main
from sparse_expansion.plain_files import SEAL, sealed
from sparse_expansion.report.comparison import against_baseline
from sparse_expansion.report.describe import describe_machine
from sparse_expansion.report.facts import read_facts
from sparse_expansion.report.page import report_page
from sparse_expansion.run_files import RUN_FILE
from sparse_expansion.store import Store
from tests.tiny import SMALL_RUN

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MEASURE = """<!doctype html><iframe id="f" style="width:{width}px;height:900px;border:0"
srcdoc="{page}"></iframe><script>
document.getElementById("f").onload = (event) => {{
  const root = event.target.contentDocument.documentElement;
  const heads = [...root.querySelectorAll("h2")].map((one) => one.textContent);
  document.body.dataset.found = `${{root.scrollWidth}} ${{root.scrollHeight}} ${{heads.join("|")}}`;
}};</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama_folder, text_folder):
    output = tmp_path_factory.mktemp("page") / "out"
    where = ["--model", str(llama_folder), "--dataset", str(text_folder), "--output", str(output)]
    assert main(["run", *where, "--eval-windows", "3", *SMALL_RUN]) == 0
    return output


@pytest.fixture(scope="module")
def page(folder):
    """The page of the finished run."""
    return page_of(Store(str(folder)))


def page_of(store, **options):
    return report_page(read_facts(store), **options)


def plain(page):
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def test_a_finished_run(folder, tmp_path, capsys):
    path = tmp_path / "deep" / "report.html"
    assert main(["report", str(folder), "--html", str(path), "--price", "3600"]) == 0
    page = path.read_text()
    metrics = Store(str(folder)).read_json("metrics.json")
    text = plain(page)
    for wanted in (
        f"{metrics['perplexity_expanded']:.3f}",
        f"{metrics['perplexity_dense']:.3f}",
        f"{math.log(metrics['perplexity_expanded'] / metrics['perplexity_dense']):.4f} gap, nats",
        f"{metrics['perplexity_expanded'] / metrics['perplexity_dense'] - 1:+.1%} perplexity",
        f"{metrics['checkpoint_bytes'] / metrics['dense_checkpoint_bytes']:.2f} ×",
        "operations of MLPs and routers per token against dense",
        *metrics["versions"].values(),
        metrics["date"],
        metrics["command"],
        describe_machine(metrics),
        f"{sum(metrics['unit_seconds'].values()):.2f}",
        "Where quality is lost",
        "Sparsity by block",
        f"{metrics['starved_experts']} of {metrics['num_experts']} experts",
        "mlp.gate_proj",
        "routing.num_clusters",
        "shared by all experts",
    ):
        assert wanted in text, wanted
    assert "Unfinished" not in text and "baseline" not in text and "sample" not in text
    assert page_of(Store(str(folder)), price_per_hour=3600) == page


def most_likely(folder, prompt, count):
    """What a model says next, one whole pass a token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
    begin = tokens.shape[1]
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(tokens[0, begin:], skip_special_tokens=True)


def test_a_baseline_and_a_sample(folder, llama_folder, tmp_path, capsys):
    prompt, path = "The <b>for</b> statement", tmp_path / "report.html"
    flags = ["--sample", prompt, "--sample-tokens", "6", "--baseline", str(folder), "--json"]
    assert main(["report", str(folder), "--html", str(path), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sample"] == {
        "prompt": prompt,
        "dense": most_likely(llama_folder, prompt, 6),
        "expanded": most_likely(folder, prompt, 6),
    }
    assert found["compared"][0] == found["compared"][1]
    page = path.read_text()
    assert "<b>for" not in page and "&lt;b&gt;for" in page
    name = found["compared"][0]["name"]
    assert f"{name} closes 0.0% of the gap that {name} has" in plain(page)
    for said in found["sample"].values():
        assert html.escape(said, quote=False) in page.replace("&#34;", '"').replace("&#39;", "'")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sample", "x" * 900], "more than the model's 256 positions"),
        (["--sample", ""], "--sample: the prompt has no tokens"),
        (["--sample", "a", "--sample-tokens", "0"], "--sample-tokens 0 must be at least 1"),
        (["--sample", "a", "--dense", "/nowhere"], "/nowhere does not exist"),
        (["--baseline", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_samples_and_baselines_that_cannot_be_had(folder, flags, message, capsys):
    assert main(["report", str(folder), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_baseline_by_hand():
    def row(name, gap):
        return {"name": name, "gap": gap}

    assert against_baseline(row("a", 0.4), row("b", 0.1)).startswith("b closes 75.0% of the gap")
    assert against_baseline(row("a", 0.4), row("b", 0.5)).startswith("b widens by 25.0% the gap")
    assert against_baseline(row("a", -0.1), row("b", 0.1)).startswith("a loses nothing")


def test_plots_are_well_formed_and_complete(page):
    plots = re.findall(r"<figure>(.*?)</figure>", page, re.S)
    errors, allocation, clusters, timeline = plots
    for plot in plots:
        ElementTree.fromstring(plot)
    assert "mlp.down_proj" in errors and "mlp.down_proj" in clusters
    assert "share of zeros" in allocation
    assert "capture" in timeline and "local" in timeline


def test_an_unfinished_run(folder, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    for name in ("metrics.json", "manifest.json", "config.json"):
        (half / name).unlink()
    for marker in (half / "run").rglob("*layer-001*"):
        shutil.rmtree(marker) if marker.is_dir() else marker.unlink()
    page = page_of(Store(str(half)))
    assert "Unfinished" in page and "--resume" in page
    assert "What came out" not in page and "Where quality is lost" in page


def test_nothing_done_yet(folder, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(folder / RUN_FILE, tmp_path / RUN_FILE)
    page = page_of(Store(str(tmp_path)))
    assert "0 units are done" in plain(page) and "Settings" in page


def test_text_from_files_is_escaped_and_nothing_is_fetched(folder, tmp_path):
    evil = tmp_path / "evil"
    shutil.copytree(folder, evil)
    run = evil / RUN_FILE
    changed = re.sub('"model": "[^"]*"', '"model": "m/<script>alert(1)\\\\u001b"', run.read_text())
    found = json.loads(changed)
    del found[SEAL]
    run.write_text(json.dumps(sealed(found)))
    page = page_of(Store(str(evil)))
    assert "<script" not in page and "&lt;script&gt;alert(1)\\x1b" in page and "\x1b" not in page
    # Namespaces of SVG are names, not addresses.
    links = set(re.findall(r"""(?:src|href)=["'](?!#)[^"']*""", page))
    assert not links and "url(http" not in page and "@import" not in page


def test_a_folder_without_a_run(tmp_path, capsys):
    assert main(["report", str(tmp_path), "--html", str(tmp_path / "r.html")]) == 2
    assert not (tmp_path / "r.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_it_without_sideways_scrolling(width, page, tmp_path):
    escaped = html.escape(page, quote=True)
    (tmp_path / "measure.html").write_text(MEASURE.format(width=width, page=escaped))
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking "
    flags += "--no-first-run --disable-sync --window-size=1400,1000 --dump-dom"
    where = [f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path}/measure.html"]
    done = subprocess.run(
        [CHROMIUM, *flags.split(), *where], capture_output=True, text=True, timeout=120
    )
    found = re.search(r'data-found="(\d+) (\d+) ([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    assert int(found[1]) <= width and int(found[2]) > 900
    assert "What came out|Where quality is lost" in found[3]
