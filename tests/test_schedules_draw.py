"""`megacoder plan`: the table, the JSON and the pictures show the simulated schedule."""

import json
import struct
import zlib
from xml.etree import ElementTree

import numpy as np
import pytest
from command_line import refusal

from megacoder.cli.main import main
from megacoder.core.errors import ConfigError
from megacoder.parallel.schedules.draw import draw
from megacoder.parallel.schedules.generators import SCHEDULES, build_schedule
from megacoder.parallel.schedules.picture import Box, Picture, Text, text_width
from megacoder.parallel.schedules.simulate import Costs, simulate

SVG = "{http://www.w3.org/2000/svg}"


def read_png(path):
    """Pixels of a PNG of 8-bit RGB rows without filters; checks every checksum."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack_from(">I", data, at + 8 + size)[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + size
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 2, 0, 0, 0]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), dtype=np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def test_png_holds_boxes_and_letters(tmp_path):
    picture = Picture(width=40, height=20)
    picture.boxes.append(Box(x=2, y=3, width=5, height=4, color=(10, 20, 30)))
    picture.texts.append(Text(x=20, y=2, text="T", color=(200, 0, 0)))
    picture.write(tmp_path / "a.png")
    pixels = read_png(tmp_path / "a.png")
    assert (pixels[3:7, 2:7] == (10, 20, 30)).all()
    assert (pixels[2:4, 20:30] == (200, 0, 0)).all(), "the bar of the T, two pixels per dot"
    assert (pixels[4:16, 24:26] == (200, 0, 0)).all(), "its stem"
    assert (pixels != 255).any(axis=2).sum() == 5 * 4 + 10 * 2 + 12 * 2


def test_text_past_the_edge_is_cut(tmp_path):
    picture = Picture(width=10, height=10, texts=[Text(x=4, y=4, text="88")])
    picture.write(tmp_path / "a.png")
    assert read_png(tmp_path / "a.png").shape == (10, 10, 3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_svg_has_a_box_per_action_at_its_time(tmp_path, name):
    schedule = build_schedule(name, num_ranks=3, num_microbatches=11)
    timeline = simulate(schedule, Costs.uniform(schedule.stage_map.num_stages))
    draw(timeline, tmp_path / "a.svg")
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    boxes = [box for box in root.iter(f"{SVG}rect") if box.get("height") == "30" and box.get("fill") != "#f0f0f0"]
    assert len(boxes) == sum(map(len, schedule.ranks))
    rows = sorted({float(box.get("y")) for box in boxes})
    assert len(rows) == 3
    backgrounds = [box for box in root.iter(f"{SVG}rect") if box.get("fill") == "#f0f0f0"]
    left, width = (float(backgrounds[0].get(key)) for key in ("x", "width"))
    scale = width / timeline.makespan
    for rank, y in enumerate(rows):
        found = sorted(float(box.get("x")) for box in boxes if float(box.get("y")) == y)
        assert found == pytest.approx([left + scale * start for start in timeline.start[rank]], abs=0.01)
    numbers = [text.text for text in root.iter(f"{SVG}text") if text.text.isdigit()]
    assert sorted(numbers) == sorted(str(action.microbatch) for actions in schedule.ranks for action in actions)
    total = float(root.get("width"))
    assert all(float(box.get("x")) + float(box.get("width")) <= total for box in boxes)


def test_a_long_schedule_stays_drawable(tmp_path):
    schedule = build_schedule("1f1b", num_ranks=2, num_microbatches=2000)
    draw(simulate(schedule, Costs.uniform(2)), tmp_path / "a.png")
    pixels = read_png(tmp_path / "a.png")
    assert pixels.shape[1] < 12_500
    assert {(130, 177, 226), (244, 166, 102)} <= set(map(tuple, pixels[70]))


def test_text_width_is_what_png_draws():
    assert text_width("A") == 10
    assert text_width("AB") == 22


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot draw to .*a\.pdf: the name must end in \.png or \.svg"):
        Picture(width=1, height=1).write(tmp_path / "a.pdf")
    assert not list(tmp_path.iterdir())


def test_plan_prints_a_table(capsys):
    main(["plan", "--schedule", "1f1b", "--pp", "4", "--microbatches", "8"])
    out = capsys.readouterr().out
    assert "1f1b, pp 4, microbatches 8, chunks 1: makespan 33, idle 27.3%" in out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert rows == [
        ["0", "27.3%", "27.3%", "4", "0"],
        ["1", "27.3%", "18.2%", "3", "0"],
        ["2", "27.3%", "9.1%", "2", "0"],
        ["3", "27.3%", "0.0%", "1", "0"],
    ]


def test_plan_prints_json_and_draws(capsys, tmp_path):
    path = tmp_path / "out.png"
    size = ["--schedule", "interleaved", "--pp", "2", "--microbatches", "4", "--chunks", "3"]
    main(["plan", *size, "--weight-grad", "2", "--latency", "0.5", "--json", "--draw", str(path)])
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert captured.err == f"wrote {path}\n"
    assert (report["schedule"], report["pp"], report["microbatches"], report["chunks"]) == ("interleaved", 2, 4, 3)
    assert [rank["peak_activations"] for rank in report["ranks"]] == [7 / 3, 5 / 3]
    assert report["idle"] == pytest.approx(1 - 4 * 4 / report["makespan"])
    assert read_png(path).shape[0] > 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--schedule", "zb1"], "unknown schedule 'zb1' (did you mean 'zb-h1'?)"),
        (["--pp", "0"], "schedule '1f1b' with 0 pipeline ranks: needs at least 1"),
        (["--forward", "-1"], "needs times above 0"),
        (["--draw", "out.pdf"], "cannot draw to out.pdf"),
        (["--chunks", "2"], "schedule '1f1b' with 2 chunks"),
        (["--schedule", "1f1b", "--pp", "4", "--microbatches", "100000000"], "their product may be at most 1,048,576"),
        (["--model", "33b", "--device", "h100", "--devices", "9999999"], "--devices 9999999: at most 1,048,576"),
        (["--microbatch", "2"], "unknown option '--microbatch' (did you mean '--microbatches'?)"),
    ],
)
def test_plan_fails_with_one_line(capsys, options, message):
    assert message in refusal(capsys, "plan", *options, code=2)
