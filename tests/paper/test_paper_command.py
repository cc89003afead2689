"""``python -m benchmarks.paper``: what it refuses, what it writes, and what is committed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks.paper import __main__, summary
from benchmarks.paper.catalogue import EXPERIMENTS
from benchmarks.paper.mirror import Mirror
from benchmarks.paper.record import RESULTS, read_records


@dataclass(frozen=True)
class TinyMirror(Mirror):
    """The same, in no time."""

    steps: int = 10
    dimension: int = 3


@pytest.fixture
def tiny_mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(EXPERIMENTS, "mirror", TinyMirror)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_run_writes_record_plot_and_summary(
    tiny_mirror: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = summary.DOCUMENT.read_bytes()
    arguments = ["mirror", "--seeds", "2", "--output", str(tmp_path / "new")]
    assert __main__.main(arguments) == 0
    record = json.loads((tmp_path / "new" / "mirror.json").read_text())
    assert record["settings"] == {"seeds": 2, "workers": 2, "steps": 10, "dimension": 3, "lr": 0.01}
    assert record["environment"]["command"].endswith(f"mirror --seeds 2 --output {tmp_path}/new")
    assert record["environment"]["threads"] == 1
    assert (tmp_path / "new" / "mirror.png").stat().st_size > 5000
    written = (tmp_path / "new" / "summary.md").read_text()
    claims = [*Mirror.claims(record), *summary.UNTESTABLE]
    for claim in claims:
        assert f"| {claim.text} | **{claim.verdict.value}** | {claim.figure} |" in written
    assert written.count("\n| ") == len(claims) + 2
    assert "The paper's claims" in capsys.readouterr().out
    # From the record alone, the same again.
    (tmp_path / "new" / "mirror.png").unlink()
    (tmp_path / "new" / "summary.md").unlink()
    assert __main__.main(["--report", "--output", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "mirror.png").is_file()
    assert (tmp_path / "new" / "summary.md").read_text() == written
    assert json.loads((tmp_path / "new" / "mirror.json").read_text()) == record
    # Results elsewhere are not those that the documentation shows.
    assert summary.DOCUMENT.read_bytes() == document


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mirrors"], ["unknown experiment 'mirrors'", *EXPERIMENTS]),
        (["--seeds", "1"], ["--seeds 1", "2 seeds or more"]),
        (["--workers", "-1"], ["--workers -1", "0"]),
        (["--output", __file__], ["--output", "is a file", "folder"]),
        (["--report", "--output", "/nowhere"], ["--report", "/nowhere", "records"]),
        (["images", "--data", "/nowhere"], ["/nowhere", "data_batch_1.bin", "test_batch.bin"]),
        (["mirror", "--data", "/nowhere"], ["--data is for images", "mirror"]),
        (["images", "--device", "cuda:99"], ["--device cuda:99"]),
        (["mirror", "--device", "cpu"], ["--device is for images"]),
    ],
)
def test_bad_option_is_refused_before_anything_runs(
    arguments: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        __main__.main(arguments)
    assert ended.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert [word for word in words if word not in message] == []


def test_committed_results_cover_every_experiment() -> None:
    records = read_records(RESULTS)
    assert {record["experiment"] for record in records.values()} == EXPERIMENTS.keys()
    for stem, record in records.items():
        assert record["settings"]["seeds"] >= 5, stem
        assert record["environment"]["threads"] == 1, stem
        assert len({record["environment"]["command"] for record in records.values()}) == 1
        for name in EXPERIMENTS[record["experiment"]].draw(record):
            assert (RESULTS / f"{name}.png").is_file()


def test_claims_are_judged_from_the_committed_records() -> None:
    judged = summary.judge(RESULTS)
    assert summary.as_markdown(judged, "") in (RESULTS / "summary.md").read_text("utf-8")
    document = summary.DOCUMENT.read_text("utf-8")
    between = document.partition(summary.BEGIN)[2].partition(summary.END)[0]
    assert between.strip() == summary.as_markdown(judged, "../benchmarks/paper/results/").strip()


def test_plots_that_the_documentation_shows_are_there() -> None:
    shown = [part.partition(")")[0] for part in summary.DOCUMENT.read_text("utf-8").split("](")[1:]]
    links = [link for link in shown if "://" not in link and not link.startswith("#")]
    assert any(link.endswith(".png") for link in links)
    missing = [link for link in links if not (summary.DOCUMENT.parent / link).exists()]
    assert missing == []
