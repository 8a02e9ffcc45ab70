"""The page of `cfgrl report`, its command line, and what it refuses."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_runs import make_evaluation, make_training, make_video, result

from cfgrl_gym.cli import main
from cfgrl_gym.cli.configs import ReportConfig
from cfgrl_gym.cli.report import run

VOID = {"meta", "img", "br", "wbr"}
HOSTILE = "<script>alert(\"1\")</script> & 'x' $\\frac{1$"  # the end isn't mathtext either
RESULTS = [result(w, {0: (4, 10)}, gap=w) for w in (1.0, 1.5, 2.0)]


class Page(HTMLParser):
    """Tags of a page; fails where one is closed that isn't open."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.data = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.data += data
        else:
            self.texts.append(data)

    def values(self, *attributes: str) -> list[str]:
        return [v for _, given in self.tags for a, v in given.items() if a in attributes and v]


def study(folder: Path) -> Path:
    """A training with everything, evaluated, and its start."""
    rows = [
        {
            "time/iterations": i,
            "train/loss": 1 / i,
            "train/grad_norm": 1.0,
            "time/seconds_simulation": 9,
            "time/seconds_update": 1,
        }
        for i in (1, 2)
    ]
    evaluations = [(0, 0, 0.0, RESULTS[:2]), (2, 40, 20.0, RESULTS[:2])]
    training = make_training(folder / "rl", rows, evaluations)
    make_training(folder / "other", rows, evaluations, dropout_prob=0.5)
    make_evaluation(training / "eval", RESULTS, "runs/rl", videos=["success", "failure"])
    make_evaluation(folder / "start", RESULTS)
    return folder


def report(folder: Path, **options: object) -> Page:
    out = folder.parent / f"{folder.name}.html"
    path = run(ReportConfig(runs=str(folder), out=str(out), **options))  # type: ignore[arg-type]
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_is_well_formed_and_needs_no_other_file(tmp_path: Path) -> None:
    page = report(study(tmp_path / "runs"))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    for link in page.values("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
        assert link.startswith(("#", "data:")), link[:80]
        assert link.startswith("data:") or link[1:] in ids, link
    text = (tmp_path / "runs.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|<link|<script src|<iframe", text)
    targets = re.findall(r"url\(([^)]*)\)", text)
    assert targets
    assert all(target.strip("'\"#") in ids for target in targets)
    for heading in ("Summary", "Learning curves", "Guidance sweep", "Methods and trainings",
                    "Where the time goes", "Filmstrips", "Configuration and versions"):  # fmt: skip
        assert heading in page.texts
    figures = [given for tag, given in page.tags if tag == "svg"]
    assert len(figures) >= 6
    assert all(given.get("aria-label") for given in figures)
    assert "cfg_scale w" in page.texts  # text in figures is text
    assert len(text) < 1_000_000


@pytest.mark.parametrize("kind", ["evaluation", "training", "training with an evaluation at once"])
def test_a_single_run_makes_a_page(kind: str, tmp_path: Path) -> None:
    if kind == "evaluation":
        make_evaluation(tmp_path / "runs", RESULTS[:1])
    else:
        once = [(0, 0, 0.0, RESULTS[:1])] if kind != "training" else []
        make_training(tmp_path / "runs", [{"train/loss": 1}], once)
    page = report(tmp_path / "runs")
    assert len(json.loads(page.data)["methods"]) == (kind != "evaluation")
    assert "runs" in page.texts


def test_names_are_shown_and_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / HOSTILE.replace("/", "∕")
    training = make_training(folder, policy=HOSTILE, evaluations=[(1, 9, 9.0, RESULTS)])
    make_evaluation(training / "eval", RESULTS, "runs/x", suite=HOSTILE, videos=["success"])
    make_evaluation(tmp_path / "runs" / "c", RESULTS, HOSTILE)
    make_training(tmp_path / "runs" / "b", algorithm=HOSTILE)
    page = report(tmp_path / "runs", title=HOSTILE)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert page.texts.count(HOSTILE) >= 2  # the title, in the head and as a heading
    assert any(folder.name in text for text in page.texts)
    assert any(HOSTILE in label for label in page.values("aria-label"))
    assert json.loads(page.data)["title"] == HOSTILE
    assert any(HOSTILE in m["method"] for m in json.loads(page.data)["methods"])
    handlers = [a for _, given in page.tags for a in given if a.startswith("on")]
    assert not handlers


def test_filmstrips_are_frames_from_the_first_to_the_last(tmp_path: Path) -> None:
    folder = make_evaluation(tmp_path / "runs", RESULTS)
    make_video(folder / "failure.mp4", frames=41, size=(256, 512))
    make_video(folder / "success.mp4", frames=5)
    page = report(folder, embed_videos=True)
    images = [given for tag, given in page.tags if tag == "img"]
    assert len(images) == 5 + 8  # the success comes first, and has no more frames
    pixels = []
    for given in images[5:]:
        kind, _, content = str(given["src"]).partition(",")
        assert kind == "data:image/jpeg;base64"
        image = Image.open(io.BytesIO(base64.b64decode(content)))
        assert image.size == (256, 128)
        pixels.append(float(np.asarray(image).mean()))
    assert pixels == pytest.approx(np.linspace(0, 255, 8), abs=12)
    assert str(images[-1]["alt"]).endswith("2.0 s")  # 40 steps at 20 a second
    captions = [text for text in page.texts if text.startswith(("Success:", "Failure:"))]
    assert captions == [
        "Success: libero_object task 0, initial state 0, w = 1",
        "Failure: libero_object task 0, initial state 4, w = 1",
    ]
    videos = [given["src"] for tag, given in page.tags if tag == "video"]
    original = base64.b64encode((folder / "success.mp4").read_bytes()).decode()
    assert videos[0] == f"data:video/mp4;base64,{original}"
    assert not any(tag == "video" for tag, _ in report(folder).tags)


def test_words_and_the_option_name_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b, c"):
        make_evaluation(tmp_path / "runs" / name, RESULTS[:1])
    forms = (
        ["report", "runs/a", "--out", "out/1.html", "runs/b, c"],
        ["report", "--out=out/2.html", "runs/a", "runs/b, c"],
        ["report", "--runs", '["runs/a", "runs/b, c"]', "--out", "out/3.html"],
        ["report", "--runs", "runs", "--out", "out/4.html"],
    )
    for number, arguments in enumerate(forms, start=1):
        assert main(arguments) == 0
        page = Page(Path(f"out/{number}.html").read_text(encoding="utf-8"))
        assert {"a", "b, c"} <= set(page.texts)
    capsys.readouterr()
    for arguments in (["report", "runs", "--runs", "runs"], ["report"], ["report", "--runs", "[]"]):
        with pytest.raises(SystemExit):
            main(arguments)
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "runs" in error
    assert {path.name for path in Path("out").iterdir()} == {f"{n}.html" for n in (1, 2, 3, 4)}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cfgrl: error: ")
    assert error.count("\n") == 1
    return error


DAMAGED = [
    ("rl/eval/eval.json", '{"policy": "x"', "not JSON"),
    ("rl/eval/eval.json", '{"policy": "x", "suite": "y"}', "'results' is missing"),
    ("rl/eval/eval.json", '{"policy": "x", "suite": "y", "results": []}', "no results"),
    ("rl/eval/eval.json", "[]", "list"),
    ("rl/evaluations.json", '{"suite": "y", "evaluations": [{}]}', "missing"),
    ("rl/config.yaml", "a: [1", "not YAML"),
    ("rl/config.yaml", "just words", "options"),
    ("rl/versions.json", "\x00", "not JSON"),
    ("rl/progress.csv", "time/iterations,train/loss\n1,0.5\n2\n", "line 3: 1 cells"),
    ("rl/progress.csv", "time/iterations,train/loss\n1,much\n", "line 2, train/loss: 'much'"),
    ("rl/eval/success.mp4", "no film", "not a video"),
]


@pytest.mark.parametrize(("name", "content", "reason"), DAMAGED)
def test_a_damaged_file_is_named_and_an_earlier_report_kept(
    name: str,
    content: str,
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = study(tmp_path / "runs")
    out = tmp_path / "report.html"
    assert main(["report", str(folder), "--out", str(out)]) == 0
    earlier = out.read_bytes()
    capsys.readouterr()
    (folder / name).write_text(content)
    error = refused([str(folder), "--out", str(out)], capsys)
    assert f"{folder}/{name}' is damaged" in error
    assert reason in error
    assert "leave this run out" in error
    assert out.read_bytes() == earlier
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "report.html"}


def test_impossible_counts_are_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_evaluation(tmp_path / "a", [result(1.0, {0: (5, 4)})])
    assert "eval.json' is damaged" in refused([str(tmp_path)], capsys)


def test_only_an_earlier_report_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = make_evaluation(tmp_path / "runs", RESULTS[:1])
    out = tmp_path / "page.html"
    out.write_text("<html>mine</html>")
    assert "--out" in refused([str(runs), "--out", str(out)], capsys)
    assert out.read_text() == "<html>mine</html>"
    assert "--out" in refused([str(runs), "--out", str(runs)], capsys)
    out.unlink()
    for title in ("One", "Two"):
        assert main(["report", str(runs), "--out", str(out), "--title", title]) == 0
    assert "<h1>Two</h1>" in out.read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "page.html"}


def test_folders_without_runs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").write_text("x")
    make_training(Path("unfinished"), rows=[])
    assert "'missing' does not exist" in refused(["missing"], capsys)
    assert "'file' is a file" in refused(["file"], capsys)
    error = refused(["empty"], capsys)
    assert "no runs in 'empty'" in error
    assert "cfgrl train" in error
    assert "without a finished iteration" in refused(["unfinished"], capsys)
    assert not Path("report.html").exists()
