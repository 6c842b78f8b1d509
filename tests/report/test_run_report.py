"""The page of a run: one file that loads nothing, figures that show what the run's files hold, a diagnosis with evidence."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from made_runs import EPOCHS, epoch, make_run, update
from p3b.errors import RunFolderError
from p3b.report.charts import draw_all
from p3b.report.diagnosis import CHECKS, diagnose
from p3b.report.evaluation import calibration, class_accuracies, confused_pairs
from p3b.report.record import read_run
from p3b.report.run_report import write_run_report


class Page(HTMLParser):
    """What a page refers to, its ids, and the text alternatives of its figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.labels: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [value for key in ("href", "src", "xlink:href") if (value := found.get(key))]
        self.ids += [value] if (value := found.get("id")) else []
        if tag == "svg":
            self.labels.append(found.get("aria-label") or "")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "photos")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_run_report([run], run / "report.html").read_text()


def test_the_page_opens_with_the_answer_and_loads_nothing(page: str) -> None:
    parsed = Page(page)
    said = re.search(r'<p class="answer">(.*?)</p>', page)
    assert said is not None and "50% smaller (500 parameters) and runs 1.50 times as fast" in said[1]
    assert "16.66 points less top-1 (test: 66.67 %)" in said[1]
    assert page.index("answer") < page.index("<figure")
    assert all(link.startswith(("data:", "#")) for link in parsed.links), "nothing comes from elsewhere"
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert len(set(parsed.ids)) == len(parsed.ids), "figures do not share names"
    assert len(parsed.labels) == 8 and all(len(label) > 30 for label in parsed.labels)
    assert "top-5" not in page, "top-5 of three classes says nothing"


def test_names_of_classes_are_text_and_not_markup(page: str) -> None:
    assert "<dog>" not in page
    assert "&lt;dog&gt;, taken for bird" in page


def test_every_figure_has_its_data_as_csv(run: Path) -> None:
    stage = read_run(run)[0]
    pictures = {picture.name: picture for picture in draw_all(stage)}
    data = base64.b64decode(pictures["learning-curves"].csv_link.split(",")[1]).decode()
    rows = list(csv.DictReader(io.StringIO(data)))
    assert [float(row["val_top1"]) for row in rows] == [line["val_top1"] for line in EPOCHS]
    kept = list(csv.DictReader(io.StringIO(pictures["network"].csv)))
    assert [int(row["kept_params"]) for row in kept] == [block["kept_params"] for block in stage.updates[-1].blocks]
    assert all(picture.svg.count("<path") + picture.svg.count("<use") > 5 for picture in pictures.values()), "none is empty"
    assert "#222222" not in pictures["benefit"].svg, "ink is the page's, light or dark"


def test_several_runs_and_runs_without_an_end_have_a_page(run: Path, tmp_path: Path) -> None:
    going_on = make_run(tmp_path / "second", finished=False)
    text = write_run_report([run, going_on], tmp_path / "both.html", reload_seconds=30).read_text()
    assert "photos: prune" in text and "second: prune" in text
    assert "in the phase fine-tune, after 6 epochs: 68.00 % top-1 (val) with 400 parameters" in text
    assert 'http-equiv="refresh" content="30"' in text
    ids = Page(text).ids
    assert len(set(ids)) == len(ids)


def test_what_is_no_run_or_is_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run: expected the output folder of 'p3b train'"):
        write_run_report([tmp_path], tmp_path / "report.html")
    run = make_run(tmp_path / "run")
    (run / "prune" / "predictions.csv").write_text("part,index\ntest,0\n")
    with pytest.raises(RunFolderError, match=r"predictions\.csv is damaged"):
        write_run_report([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_predictions_come_to_accuracies_mistakes_and_calibration(run: Path) -> None:
    stage = read_run(run)[0]
    found = {entry.name: (entry.images, entry.accuracy, entry.dense) for entry in class_accuracies(stage)}
    assert found == {"bird": (2, 50.0, 100.0), "cat": (2, 100.0, 50.0), "<dog>": (2, 0.0, 100.0)}
    assert class_accuracies(stage)[0].name == "<dog>", "what lost most comes first"
    assert [(pair.target, pair.predicted, pair.images) for pair in confused_pairs(stage)] == [
        ("<dog>", "bird", 2),
        ("bird", "cat", 1),
    ]
    measured = calibration(stage)
    assert measured is not None and sum(each.images for each in measured.bins) == 6
    # By hand: bins 0.4 (0 of 1), 0.5 (0 of 1), 0.6 (0 of 1), 0.7 (1 of 1), 0.8 (1 of 1), 0.9 (1 of 1).
    assert measured.error == pytest.approx(100 * (0.4 + 0.55 + 0.6 + 0.3 + 0.2 + 0.1) / 6)


def test_the_diagnosis_names_what_the_records_show(run: Path, tmp_path: Path) -> None:
    found = {finding.check: finding for finding in diagnose(read_run(run)[0])}
    assert set(found) == {"largest drop", "vanished blocks", "collapsed classes"}
    assert "Epoch 3 (sparsify) lost 30.0 points of val top-1" in found["largest drop"].says
    assert "blocks.0.attn lost most parameters" in found["largest drop"].evidence
    assert "2 of 4 blocks are gone: blocks.0.attn, blocks.1.attn" in found["vanished blocks"].says
    random = make_run(tmp_path / "random", model={"model": "vit"}, resolved={"steps_per_epoch": 10, "classes": 3})
    assert {"random weights", "steps between mask updates"} <= {finding.check for finding in diagnose(read_run(random)[0])}


def test_a_run_without_trouble_has_no_findings(tmp_path: Path) -> None:
    run = make_run(tmp_path / "good", finished=False)
    stage = run / "prune"
    (stage / "blocks.jsonl").write_text("".join(json.dumps(update(at, 60)) + "\n" for at in (1.5, 2.0, 2.5, 3.0)))
    (stage / "metrics.jsonl").write_text("".join(json.dumps(epoch(n, "sparsify", 60 + n)) + "\n" for n in range(1, 7)))
    assert diagnose(read_run(run)[0]) == []
    assert len({check.__name__ for check in CHECKS}) == 10
