"""The page (app.py) in a real browser: Chromium, driven by playwright. `make test-browser` installs both."""

import io
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROJECT
from moving_shapes import moving_shapes
from PIL import Image

import predict_flow
from flow_data.flow_io import read_flow
from flow_inference.video_files import VideoReader, VideoWriter

pytest.importorskip("gradio", reason="the page needs gradio: make test-browser installs it")
sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: make test-browser installs it")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: make test-browser installs it where it can"),
]

HEIGHT, WIDTH = 128, 168
TIMEOUT = 120_000  # ms; what is waited for takes a second or two on an idle machine
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Two frames, one of another size, a short clip with a duplicate frame and a scene cut, and a long one."""
    folder = tmp_path_factory.mktemp("files")
    shapes = moving_shapes(100, HEIGHT, WIDTH, [(1, 1), (-2, 1)]).frames
    Image.fromarray(shapes[0]).save(folder / "first.png")
    Image.fromarray(shapes[2]).save(folder / "second.png")
    Image.fromarray(shapes[0][:100, :150]).save(folder / "small.png")
    Image.fromarray(shapes[0]).save(folder / "deep.tif")
    (folder / "text.png").write_text("no image at all")
    (folder / "text.mp4").write_text("no video at all")
    other = 255 - shapes[40][::-1]
    for name, frames in (("clip.mp4", [*shapes[[0, 1, 1, 2, 3]], other]), ("long.mp4", shapes)):
        with VideoWriter(folder / name, 12) as video:
            for frame in frames:
                video.write(frame)
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, subprocess.Popen]]:
    """The page as `make demo` starts it, in a process of its own."""
    with serve([str(PROJECT / "app.py")]) as started:
        yield started


@contextmanager
def serve(program: list[str], **environment: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """Start a program that serves the page at `--port`, and wait until it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(PROJECT),
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        **environment,
    }
    process = subprocess.Popen([sys.executable, *program, "--port", str(port)], env=environment)
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(600):
            assert process.poll() is None, "app.py has ended"
            try:
                urllib.request.urlopen(url, timeout=10).close()
                break
            except OSError:
                time.sleep(0.2)
        yield url, process
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as browser:
            yield browser


@pytest.fixture
def visit(server, browser) -> Iterator[Callable]:
    """Open the page as a new visitor: `visit(width=375, theme="dark")`. No page may ask other servers for anything."""
    contexts, requests, errors = [], [], []

    def open_page(width: int = 1280, theme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{server[0]}?__theme={theme}")
        page.wait_for_selector("#compute")
        return page

    yield open_page
    for context in contexts:
        context.close()
    local = (server[0], "data:", "blob:")
    assert not [url for url in requests if not url.startswith(local)]
    assert not errors


def give_frames(page, first: Path, second: Path) -> None:
    for number, path in ((1, first), (2, second)):
        page.locator(f"#file{number} input[type=file]").set_input_files(str(path))
        page.wait_for_selector(f"#file{number} >> text={path.stem}")


def compute_flow(page, first: Path, second: Path) -> None:
    give_frames(page, first, second)
    page.locator("#compute").click()
    page.wait_for_selector("#slider img", state="attached")


def text_of(page, selector: str, pattern: str) -> str:
    """The text of an element, once it matches."""
    sync_api.expect(page.locator(selector)).to_have_text(re.compile(pattern), timeout=TIMEOUT)
    return page.locator(selector).inner_text()


def predict(*arguments: object) -> None:
    predict_flow.main([str(argument) for argument in arguments])


def save_download(page, button: str, path: Path) -> bytes:
    with page.expect_download(timeout=TIMEOUT) as waiting:
        page.locator(f"#{button}").click()
    waiting.value.save_as(path)
    return path.read_bytes()


def test_two_frames(visit, files, tmp_path, monkeypatch):
    """A click on a pixel gives predict_flow.py's flow; the downloads are its files; the code in the page does it."""
    first, second = files / "first.png", files / "second.png"
    page = visit()
    compute_flow(page, first, second)
    summary = text_of(page, "#summary", "px")
    assert "168 x 128 px, 12 updates" in summary and "From first.png to second.png, by the shipped weights" in summary
    predict(first, second, "--output", tmp_path / "flow.flo", "--max_side", 768)
    flow, _ = read_flow(tmp_path / "flow.flo")
    assert np.hypot(*flow.transpose(2, 0, 1)).mean() > 1

    image = page.locator("#marked1 img")
    image.scroll_into_view_if_needed()
    box = image.bounding_box()
    page.mouse.click(box["x"] + 0.7 * box["width"], box["y"] + 0.25 * box["height"])
    numbers = [float(number) for number in re.findall(r"[-+]?\d+(?:\.\d+)?", text_of(page, "#pixel_text", "Pixel"))]
    x, y, u, v, length, _, to_x, to_y = numbers  # the sixth is the 2 of "frame 2"
    assert abs(x - 0.7 * WIDTH) <= 2 and abs(y - 0.25 * HEIGHT) <= 2
    expected = flow[int(y), int(x)]
    assert np.abs(expected - (u, v)).max() <= 0.0051 and abs(np.hypot(*expected) - length) <= 0.0051
    assert abs(x + u - to_x) <= 0.011 and abs(y + v - to_y) <= 0.011

    page.locator("#x input").fill("12")  # the same by keyboard
    page.locator("#y input").fill("100")
    page.keyboard.press("Enter")
    assert f"({flow[100, 12, 0]:+.2f}, {flow[100, 12, 1]:+.2f})" in text_of(page, "#pixel_text", r"Pixel \(12, 100\)")

    for button, name, flags in (
        ("get_flo", "a.flo", []),
        ("get_npz", "a.npz", []),
        ("get_kitti", "a_kitti.png", ["--format", "kitti"]),
        ("get_color", "a.png", []),
    ):
        predict(first, second, "--output", tmp_path / name, "--max_side", 768, *flags)
        assert save_download(page, button, tmp_path / "downloaded") == (tmp_path / name).read_bytes(), name

    page.get_by_role("button", name="The same in Python").click()
    code = text_of(page, "#code .cm-content", "FlowVideo")
    monkeypatch.chdir(files)
    names: dict = {}
    exec(code, names)
    assert torch.equal(names["flow"], torch.from_numpy(flow.transpose(2, 0, 1).copy()))


def test_views_and_keyboard(visit, files):
    """Every view is another image with an explanation, chosen by keyboard; every image says what it is."""
    page = visit()
    compute_flow(page, files / "first.png", files / "second.png")
    captions, images, last = set(), set(), ""
    for number in range(6):
        if number:
            before = page.locator("#caption").inner_text()
            page.locator("#view input").nth(number).focus()
            page.keyboard.press("Space")
            sync_api.expect(page.locator("#caption")).not_to_have_text(before, timeout=TIMEOUT)
        captions.add(page.locator("#caption").inner_text())
        page.wait_for_function(
            "last => document.querySelectorAll('#slider img')[1]?.src.split('/').pop() !== last", arg=last
        )
        first, last = page.locator("#slider img").evaluate_all("all => all.map(image => image.src.split('/').pop())")
        images |= {first, last}
    assert len(captions) == 6
    assert {"frame1.jpg", "flow.jpg", "arrows.jpg", "warped.jpg", "occlusion.jpg", "consistency.jpg"} <= images
    texts = page.locator(".gradio-container img:visible").evaluate_all("all => all.map(image => image.alt)")
    assert {"Frame 1", "Frame 2: its place"} <= set(texts) and any(text.startswith("Color wheel") for text in texts)
    assert all(texts) and "Image" not in texts

    before = page.locator("#slider").screenshot()
    page.locator("#share input[type=range]").focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    page.wait_for_timeout(2000)
    assert page.locator("#slider").screenshot() != before

    reached = set()
    page.locator("body").click(position={"x": 1, "y": 1})
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('[id]:not([id^=component-])')?.id"))
    assert {"file1", "file2", "compute", "view", "share", "x", "y", "get_flo", "get_color"} <= reached


def test_wrong_frames(visit, files, server):
    """What is wrong is a sentence in the page, without a folder of the server; then the next try works."""
    page = visit()
    page.locator("#compute").click()
    text_of(page, "#pair_message", "Give two frames")
    compute_flow(page, files / "first.png", files / "second.png")
    page.locator("#file2 button[aria-label='Remove this file'], #file2 [aria-label='Clear']").first.click()
    page.locator("#file2 input[type=file]").set_input_files(str(files / "small.png"))
    assert "150 x 100" in text_of(page, "#file_message", "168 x 128")
    page.locator("#compute").click()
    assert "150 x 100" in text_of(page, "#pair_message", "168 x 128")
    page.wait_for_selector("#slider", state="hidden")  # a result of other frames
    page.locator("#file2 button[aria-label='Remove this file'], #file2 [aria-label='Clear']").first.click()
    page.locator("#file2 input[type=file]").set_input_files(str(files / "text.png"))
    message = text_of(page, "#file_message", "no image")
    assert "text.png" in message and "/" not in message
    page.locator("#file2 button[aria-label='Remove this file'], #file2 [aria-label='Clear']").first.click()
    page.locator("#file2 input[type=file]").set_input_files(str(files / "deep.tif"))
    page.wait_for_selector("#preview2 img")
    sync_api.expect(page.locator("#file_message")).to_have_text("", timeout=TIMEOUT)
    page.locator("#compute").click()
    text_of(page, "#summary", "168 x 128")
    sync_api.expect(page.locator("#pair_message")).to_have_text("", timeout=TIMEOUT)


class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_weights_of_others_run_no_code(visit, files, tmp_path):
    """A pickle that would run code is refused; nothing of it runs."""
    (tmp_path / "weights.pth").write_bytes(pickle.dumps({"model": Malicious(tmp_path / "ran")}))
    page = visit()
    give_frames(page, files / "first.png", files / "second.png")
    page.get_by_role("button", name="Settings").first.click()
    page.locator("#pair_weights input[type=file]").set_input_files(str(tmp_path / "weights.pth"))
    page.wait_for_selector("text=weights.pth")
    page.locator("#compute").click()
    assert "/" not in text_of(page, "#pair_message", "weights.pth")
    assert not (tmp_path / "ran").exists()


def open_video(page, path: Path) -> None:
    page.get_by_role("tab", name="Video").click()
    page.locator("#video input[type=file]").set_input_files(str(path))
    page.wait_for_selector("#video video")


def test_video(visit, files, tmp_path):
    """The result plays; the timeline has the duplicate and the cut; the downloads are predict_flow.py's files."""
    page = visit()
    open_video(page, files / "clip.mp4")
    page.locator("#compute_video").click()
    page.wait_for_selector("#shown video")
    page.wait_for_function("document.querySelector('#shown video').currentTime > 0.1", timeout=TIMEOUT)
    size = page.evaluate("(video => [video.videoWidth, video.videoHeight])(document.querySelector('#shown video'))")
    assert size == [2 * WIDTH, HEIGHT]
    words = text_of(page, "#timeline p", "frames")
    assert words.startswith("6 frames, 0.5 s.") and "Duplicate frames: 1." in words
    assert "Scene cuts after frame 5." in words
    assert page.locator("#timeline svg circle").count() == 1 and page.locator("#timeline svg rect").count() == 3

    archive = save_download(page, "get_zip", tmp_path / "flow.zip")
    predict("--video", files / "clip.mp4", "--output", f"{tmp_path}/flow/", "--max_side", 512)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "flow").iterdir()}
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        assert {name: packed.read(name) for name in packed.namelist()} == expected
    predict("--video", files / "clip.mp4", "--output", tmp_path / "flow.mp4", "--max_side", 512)
    save_download(page, "get_colors", tmp_path / "colors.mp4")
    # x264 does not always write the same bytes for the same images: in 300 files of the frames above, the mean
    # difference of a frame was at most 1.6. With 11 updates of the flow instead of 12, that of the last frame is 16.
    shown, expected = (np.float32(list(VideoReader(tmp_path / name))) for name in ("colors.mp4", "flow.mp4"))
    assert shown.shape == expected.shape == (5, HEIGHT, WIDTH, 3)
    assert np.abs(shown - expected).mean((1, 2, 3)).max() < 4


def test_stop(visit, files):
    """A stopped video ends at once, and shows what there is."""
    page = visit()
    open_video(page, files / "long.mp4")
    page.locator("#compute_video").click()
    page.wait_for_selector("#video_message >> text=/Pair [3-9]/")
    page.locator("#stop").click()
    start = time.perf_counter()
    words = text_of(page, "#video_message", "Stopped after")
    seconds = time.perf_counter() - start
    print(f"stopped after {seconds:.2f} s")
    assert seconds < 5, words
    assert 3 <= int(re.search(r"after (\d+) of 99", words)[1]) < 99
    page.wait_for_selector("#shown video")

    page.locator("#compute_video").click()
    page.wait_for_selector("#video_message >> text=/Pair [3-9]/")
    page.locator("#stop").click()
    page.locator("#compute_video").click()  # at once
    page.wait_for_selector("#video_message >> text=/Pair [3-9]/")
    page.locator("#stop").click()
    text_of(page, "#video_message", "Stopped after")


def test_wrong_video(visit, files):
    page = visit()
    page.get_by_role("tab", name="Video").click()
    page.locator("#compute_video").click()
    text_of(page, "#video_message", "Give a video")
    page.locator("#video input[type=file]").set_input_files(str(files / "text.mp4"))
    page.wait_for_timeout(1000)
    page.locator("#compute_video").click()
    message = text_of(page, "#video_message", "text.mp4")
    assert "no video" in message and "/" not in message


def test_a_file_that_is_too_large_is_refused(visit, tmp_path):
    """The page says so, and the server keeps none of it."""
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(110_000_000)
    page = visit()
    page.locator("#file1 input[type=file]").set_input_files(str(tmp_path / "large.png"))
    page.wait_for_selector("text=/exceed the maximum/")
    page.locator("#compute").click()
    text_of(page, "#pair_message", "Give two frames")


def test_uploads_and_results_are_deleted(files, browser, tmp_path):
    """After an hour: here, after seconds."""
    program = "import sys, app; app.KEEP_SECONDS, app.SWEEP_SECONDS = 20, 1; app.main(sys.argv[1:])"
    with serve(["-c", program], GRADIO_TEMP_DIR=str(tmp_path), TMPDIR=str(tmp_path)) as (url, _):
        page = browser.new_page()
        page.set_default_timeout(TIMEOUT)
        page.goto(url)
        compute_flow(page, files / "first.png", files / "second.png")
        present = {path.name for path in tmp_path.rglob("*")}
        assert {"first.png", "second.png", "flow.flo", "flow.jpg"} <= present
        deadline = time.monotonic() + 120
        while present & {"first.png", "second.png", "flow.flo", "flow.jpg"}:
            assert time.monotonic() < deadline, present
            time.sleep(0.5)
            present = {path.name for path in tmp_path.rglob("*")}
        page.locator("#compute").click()
        assert "deleted after an hour" in text_of(page, "#pair_message", "give the files again")
        page.close()
    assert not list(tmp_path.glob("optical-flow-*"))  # SIGTERM ends the page in order


def test_two_visitors(visit, files):
    """Each gets the result of the own frames, one after the other, while the second sees the queue."""
    first, second = visit(), visit()
    give_frames(second, files / "second.png", files / "first.png")
    open_video(first, files / "long.mp4")
    first.locator("#compute_video").click()
    first.wait_for_selector("#video_message >> text=/Pair [1-9]/")
    second.locator("#compute").click()
    second.wait_for_selector("#pair_message >> text=/queue: 1/")
    first.locator("#stop").click()
    text_of(first, "#video_message", "Stopped after")
    text_of(second, "#summary", "168 x 128")
    compute_flow(first_tab(first), files / "first.png", files / "second.png")
    answers = []
    for page in (first, second):
        page.locator("#x input").fill("80")
        page.locator("#y input").fill("30")
        page.keyboard.press("Enter")
        words = text_of(page, "#pixel_text", r"Pixel \(80, 30\)")
        answers.append(float(re.search(r"= \(([-+.\d]+)", words)[1]))
    assert answers[0] > 0.5 and answers[1] < -0.5  # the background moves by 2 px to the right, or back


def first_tab(page):
    page.get_by_role("tab", name="Two frames").click()
    return page


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone(visit, theme):
    """At 375 px everything is within the width, in both tabs; an example is one tap away."""
    page = visit(width=375, theme=theme)
    page.locator("#examples button").first.click()
    page.wait_for_selector("#slider img", state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    for selector in ("#file1", "#compute", "#slider", "#scale", "#marked1", "#get_color"):
        box = page.locator(selector).bounding_box()
        assert 0 <= box["x"] and box["x"] + box["width"] <= 375 and box["width"] > 100, selector
    page.get_by_role("tab", name="Video").click()
    page.wait_for_selector("#video")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    color = page.evaluate("getComputedStyle(document.querySelector('h1')).color")
    bright_text = sum(map(float, re.findall(r"[\d.]+", color)[:3])) > 384
    assert bright_text == (theme == "dark")
