"""A page in the browser: the flow of two frames, and of a video.

    make demo                       # installs what it needs, and prints the local address
    python app.py --port 7860 --model DIR_OR_REPO

It needs neither a network nor an account: without --model, it uses the shipped weights. Uploads, and results, are
deleted after an hour. One prediction runs at a time; others wait in a queue, which shows their position.
"""

import argparse
import atexit
import functools
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow_data.optional_packages import MissingPackageError, needs_extra
from flow_data.shipped_files import PRETRAINED, find_model
from flow_inference.cpu_threads import limit_spinning
from flow_inference.page_results import (
    MAX_VIDEO_SIDE,
    PAIR_FORMATS,
    SHOWN_SIDE,
    PairJob,
    Settings,
    describe_error,
    pixel_at,
    predict_two_frames,
    predict_video,
    python_code,
)

# torch and gradio are imported once the arguments are known to be good, so that --help takes no time.
if TYPE_CHECKING:
    import gradio as gr
    import numpy as np

    from modeling_raft import RaftForOpticalFlow

MAX_UPLOAD = 100  # MB
MAX_FRAME_PIXELS = 16_000_000  # of a frame: that of a phone's camera; flow of that size takes 128 MB
MAX_VIDEO_FRAMES = 120  # so long a video takes minutes on a CPU
FRAME1_SHARE = 25  # % of the width, in the slider at first
KEEP_SECONDS = 3600  # uploads and results
SWEEP_SECONDS = 300
MAX_WAITING = 20  # visitors in the queue
LOOPBACK = ("127.0.0.1", "localhost", "::1")

ZIP_FORMATS = {"none": None, ".flo": "flo", ".npz": "npz", "KITTI .png": "kitti", "color .png": "color"}
VIEWS = {  # name in the page -> key of `draw_views`, and what it shows
    "Flow": ("flow", "Color is the direction of motion and saturation its length: the wheel has the pixels."),
    "Arrows": ("arrows", "Each arrow leads from a pixel of frame 1 to its place in frame 2; a dot hardly moves."),
    "Frame 2 warped back": ("warped", "Frame 2 moved back along the flow: it is frame 1 where flow is right."),
    "Difference": ("difference", "Between frame 1 and frame 2 warped back: black is no difference."),
    "Occlusion": ("occlusion", "Pink pixels of frame 1 are hidden in frame 2, or outside of it, or their flow is "
                  "wrong: backward flow does not lead back to them."),
    "Forward-backward error": ("consistency", "How far from its start a pixel ends up by flow and backward flow: "
                               "black is 0 px, white 3 px or more."),
}  # fmt: skip
STYLE = """
.gradio-container {max-width: 1120px !important; width: 100%; margin: 0 auto !important}
.note {padding: 10px 14px; border-radius: 8px; border: 1px solid var(--border-color-primary)}
.note.error {border-color: #d92d20; border-left-width: 6px}
#pixel_text {min-height: 3.2em}
#preview1 img, #preview2 img {max-height: 220px; object-fit: contain}
#scale {max-width: 260px}
#video video {max-height: 300px}
#shown video {max-height: 420px}
"""
# Gradio's images have no alternative texts: each gets its own here, or the label of its block.
ALTERNATIVE_TEXTS = """() => {
    const own = {
        examples: (image, all) => `Example ${all.indexOf(image) + 1}: frame 1 of a pair`,
        clips: (image, all) => `Example ${all.indexOf(image) + 1}: a clip`,
        scale: () => "Color wheel: the direction and length of flow in pixels that each color stands for",
        slider: (image, all) => all.indexOf(image) === 0 ? "Frame 1"
            : document.querySelector("#caption")?.innerText ?? "",
    };
    const describe = () => document.querySelectorAll(".gradio-container img").forEach((image) => {
        const block = image.closest(".block"), id = Object.keys(own).find((id) => image.closest("#" + id));
        const label = block && block.querySelector("[data-testid='block-label']");
        const text = id ? own[id](image, [...document.querySelectorAll("#" + id + " img")])
            : image.alt || (label && label.innerText) || "Image";
        if (image.alt !== text.trim()) image.alt = text.trim();
    });
    new MutationObserver(describe).observe(document.body, {childList: true, subtree: true, attributes: true});
    describe();
}"""


class Workspace:
    """Folders of results, which are deleted after an hour, and the stop requests of visitors."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="optical-flow-"))
        self.lock = threading.Lock()  # one prediction at a time, also while a stopped one ends
        self._stops: dict[str, threading.Event] = {}
        atexit.register(shutil.rmtree, self.root, ignore_errors=True)
        threading.Thread(target=self._sweep_for_ever, daemon=True).start()

    def new_folder(self) -> Path:
        """Make the folder of a result."""
        return Path(tempfile.mkdtemp(dir=self.root))

    def stop_event(self, session: str | None) -> threading.Event:
        """Return what is set to stop the latest prediction of a visitor."""
        return self._stops.setdefault(session or "", threading.Event())

    def new_stop_event(self, session: str | None) -> None:
        """Stop what a visitor has started before, and make the event that stops what comes next."""
        self.stop_event(session).set()
        self._stops[session or ""] = threading.Event()

    def remove_visitor(self, session: str | None) -> None:
        """Stop what a visitor has started who has left."""
        self.stop_event(session).set()
        self._stops.pop(session or "", None)

    def sweep(self, now: float | None = None) -> None:
        """Delete the results that are older than an hour."""
        for folder in self.root.iterdir():
            if (time.time() if now is None else now) - folder.stat().st_mtime > KEEP_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)

    def _sweep_for_ever(self) -> None:
        while True:
            time.sleep(SWEEP_SECONDS)
            self.sweep()


def main(argv: list[str] | None = None) -> None:
    """Serve the page until Ctrl-C."""
    args = parse_args(argv)
    limit_spinning()
    try:
        page, launch_options = build_page(args)
    except MissingPackageError as error:
        sys.exit(f"app.py: error: {error}")
    threading.Thread(target=warm_up, args=[args.model], daemon=True).start()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as by Ctrl-C: uploads and results are deleted
    with suppress(KeyboardInterrupt):  # a second Ctrl-C, while the first one closes the server
        page.launch(server_name=args.host, server_port=args.port, **launch_options)


def warm_up(model: str | None) -> None:
    """Import torch and load the page's model while the first visitor looks around; mistakes are reported later."""
    with suppress(Exception):
        choose_model(Settings(1, 256, None, "", None), model, serves_others=False)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_space = os.environ.get("SPACE_ID") is not None
    parser.add_argument("--model", help="folder, repository id, or file of weights of RAFT that the page starts with; "
                        f"default: the shipped {PRETRAINED}")  # fmt: skip
    parser.add_argument("--host", default="0.0.0.0" if on_space else "127.0.0.1", help="address to serve at; "
                        "0.0.0.0 serves other machines, too (default: %(default)s)")  # fmt: skip
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--max_frames", type=int, default=MAX_VIDEO_FRAMES, help="of a video (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.max_frames < 2:
        parser.error(f"--max_frames must be at least 2; got {args.max_frames}")
    return args


# ---- Uploads, settings and messages ----


@functools.lru_cache(maxsize=2)
def load_model(source: str, modified: float) -> "RaftForOpticalFlow":
    """Load a model once; `modified` is the time of a file, so that a new one of the same name is loaded."""
    from flow_inference.devices import choose_device
    from modeling_raft.convert_raft_checkpoint import load_raft

    return load_raft(source).eval().to(choose_device())


def choose_model(settings: Settings, default: str | None, serves_others: bool) -> "RaftForOpticalFlow":
    """Load the model that a visitor has chosen.

    Args:
        settings: Whose `weights` win over its `model`; neither: the page's own model.
        default: The page's own model, as `find_model` takes it.
        serves_others: The page is served to other machines: then visitors name no files of this one.

    Raises:
        ValueError, OSError: There is no such model, or it is no RAFT.
    """
    name = settings.weights or settings.model.strip()
    if settings.weights and settings.model.strip():
        raise ValueError("Give a model by its name or a file of weights, not both.")
    if not name:
        source = find_model(default)
    elif settings.weights:
        source = settings.weights
    else:
        if (
            serves_others
            and name != PRETRAINED
            and (os.path.exists(name) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name))
        ):
            raise ValueError(f"model must be a repository id, user/name; got {name}")
        try:
            source = find_model(name)
        except FileNotFoundError as error:
            raise ValueError(f"model must be a repository id, user/name, or a folder; {error}") from error
    modified = os.path.getmtime(source) if os.path.exists(source) else 0.0
    return load_model(source, modified)


def check_image(path: str, name: str) -> None:
    """Refuse an image that is too large before it is decoded; its decoder refuses what is no image."""
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            width, height = image.size
    except Exception:  # of many types
        return
    if width * height > MAX_FRAME_PIXELS:
        raise ValueError(
            f"{name} ({Path(path).name}) must have at most {MAX_FRAME_PIXELS / 1e6:.0f} megapixels; "
            f"got {width} x {height}"
        )


def note(text: str, kind: str = "") -> str:
    """A message in the page, which screen readers read at once."""
    import html

    role = "alert" if kind == "error" else "status"
    return f'<div class="note {kind}" role="{role}">{html.escape(text)}</div>' if text else ""


def reports_errors(num_outputs: int, hides_result: bool = False) -> Callable[[Callable], Callable]:
    """Make a function of an event return a message first: what is wrong, with the other outputs as they were.

    Args:
        num_outputs: Of the function, without the message. It returns the message and these.
        hides_result: The first of these is the column of the result, which is of other inputs then.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> tuple:
            import gradio as gr

            from flow_inference.cancellation import CancelledError

            try:
                return function(*args, **kwargs)
            except CancelledError:
                return note("Stopped."), *[gr.skip()] * num_outputs
            except Exception as error:
                outputs = [gr.skip()] * num_outputs
                if hides_result:
                    outputs[0] = gr.Column(visible=False)
                return note(describe_error(error), "error"), *outputs

        return run

    return decorate


# ---- The page ----


def build_page(args: argparse.Namespace) -> tuple["gr.Blocks", dict[str, Any]]:
    """Build the page.

    Returns:
        The page, and the options to launch it with.

    Raises:
        MissingPackageError: The extra `demo` is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: else it calls its makers
    with needs_extra("demo"):
        import gradio as gr
    with needs_extra("video"):
        import av  # noqa: F401  # what is missing is to be known now, not when a visitor comes
        import cv2  # noqa: F401

    workspace, private = Workspace(), {"api_visibility": "private"}
    job_options: dict[str, Any] = {"concurrency_id": "prediction", "concurrency_limit": 1, **private}
    with gr.Blocks(title="Optical flow with RAFT", delete_cache=(SWEEP_SECONDS, KEEP_SECONDS)) as page:
        gr.Markdown(
            "# Optical flow\nFor every pixel of one frame, where it goes in the next. Images have at most "
            f"{MAX_FRAME_PIXELS // 1_000_000} megapixels, files {MAX_UPLOAD} MB. Uploads and results are deleted "
            "after an hour."
        )
        with gr.Tab("Two frames"):
            pair_tab(gr, args, workspace, job_options)
        with gr.Tab("Video"):
            video_tab(gr, args, workspace, job_options)

        def leave(request: gr.Request) -> None:
            workspace.remove_visitor(request.session_hash)

        page.unload(leave)
    page.queue(max_size=MAX_WAITING)
    plain = ["ui-sans-serif", "system-ui", "sans-serif"], ["ui-monospace", "Consolas", "monospace"]
    options = {
        "max_file_size": f"{MAX_UPLOAD}mb",
        "theme": gr.themes.Default(primary_hue="blue", font=plain[0], font_mono=plain[1]),  # no fonts of the web
        "css": STYLE,
        "js": ALTERNATIVE_TEXTS,
        "allowed_paths": [str(workspace.root), str(examples_folder())],
        "footer_links": ["settings"],
        "share": False,
        "ssr_mode": False,
        "show_error": False,
    }
    return page, options


def examples_folder() -> Path:
    """The folder of the examples: of a checkout, or of a Space, which has them beside this file."""
    here = Path(__file__).resolve().parent
    return next(path for path in (here / "space" / "examples", here / "examples") if path.is_dir())


def settings_of(gr: Any, name: str, default_side: int) -> list[Any]:
    """Add the components of `Settings`, in its order."""
    with gr.Accordion("Settings", open=False):
        with gr.Row():
            updates = gr.Slider(1, 32, value=12, step=1, label="Updates", info="More are slower, and mostly better.")
            side = gr.Slider(
                256,
                1536,
                value=default_side,
                step=64,
                label="Longest side",
                info="Flow is estimated on frames reduced to this, px.",
            )
            precision = gr.Dropdown(
                [("automatic", ""), ("float32", "no"), ("bfloat16", "bf16")], value="", label="Precision"
            )
        with gr.Row():
            model = gr.Textbox(
                label="Model",
                placeholder="shipped weights",
                info="A repository id, user/name; or a folder, where the page runs on your machine.",
            )
            weights = gr.File(label="or a file of weights of RAFT", height=120, elem_id=f"{name}_weights")
    return [updates, side, precision, model, weights]


def pair_tab(gr: Any, args: argparse.Namespace, workspace: Workspace, job_options: dict[str, Any]) -> None:
    """Add the tab of two frames."""
    private = {"api_visibility": "private"}
    with gr.Row():
        file1 = gr.File(label="Frame 1", height=120, min_width=140, elem_id="file1")
        file2 = gr.File(label="Frame 2", height=120, min_width=140, elem_id="file2")
    with gr.Row(visible=False) as previews:
        preview1 = gr.Image(label="Frame 1", interactive=False, buttons=[], min_width=140, elem_id="preview1")
        preview2 = gr.Image(label="Frame 2", interactive=False, buttons=[], min_width=140, elem_id="preview2")
    file_message = gr.HTML(elem_id="file_message", min_height=0)
    pairs = sorted(examples_folder().glob("*_1.*"), reverse=True)  # the slow one first
    examples = gr.Dataset(
        components=[gr.Image(render=False)],
        samples=[[str(path)] for path in pairs],
        label="Examples",
        type="index",
        elem_id="examples",
    )
    settings = settings_of(gr, "pair", default_side=768)
    backward = gr.Checkbox(True, label="Occlusion and forward-backward error", info="Takes twice the time.")
    compute = gr.Button("Compute flow", variant="primary", elem_id="compute")
    message = gr.HTML(elem_id="pair_message", min_height=0)
    job = gr.State()
    with gr.Column(visible=False) as result:
        summary = gr.Markdown(elem_id="summary")
        view = gr.Radio(list(VIEWS), value="Flow", label="Beside frame 1", elem_id="view")
        with gr.Row():
            slider = gr.ImageSlider(
                show_label=False,
                interactive=False,
                buttons=["fullscreen"],
                scale=4,
                min_width=320,
                slider_position=FRAME1_SHARE,
                elem_id="slider",
            )
            with gr.Column(scale=1, min_width=200):
                scale = gr.Image(
                    label="Color wheel: direction and length of flow in pixels",
                    show_label=False,
                    interactive=False,
                    buttons=[],
                    elem_id="scale",
                )
                caption = gr.Markdown(VIEWS["Flow"][1], elem_id="caption")
                # The handle in the image cannot be reached by keyboard.
                share = gr.Slider(0, 100, value=FRAME1_SHARE, step=5, label="Width of frame 1, %", elem_id="share")
        gr.Markdown("### A pixel\nClick on frame 1, or type a pixel and press Enter.")
        with gr.Row():
            x = gr.Number(label="x", value=None, precision=0, minimum=0, min_width=120, elem_id="x")
            y = gr.Number(label="y", value=None, precision=0, minimum=0, min_width=120, elem_id="y")
        pixel_text = gr.Markdown(elem_id="pixel_text")
        with gr.Row():
            marked1 = gr.Image(label="Frame 1: click a pixel", interactive=False, buttons=[], elem_id="marked1")
            marked2 = gr.Image(label="Frame 2: its place", interactive=False, buttons=[], elem_id="marked2")
        gr.Markdown("### Downloads")
        with gr.Row():
            names = {"flo": ".flo", "npz": ".npz", "kitti": "KITTI PNG", "color": "Color PNG"}
            downloads = [
                gr.DownloadButton(names[format], min_width=140, elem_id=f"get_{format}") for format in PAIR_FORMATS
            ]
        with gr.Accordion("The same in Python", open=False):
            code = gr.Code(language="python", show_label=False, interactive=False, elem_id="code")

    @reports_errors(3)
    def show_files(path1: str | None, path2: str | None) -> tuple:
        from flow_inference.frame_sources import read_frames

        paths = {"frame 1": path1, "frame 2": path2}
        for name, path in paths.items():
            if path is not None:
                check_image(path, name)
        given = [path for path in paths.values() if path is not None]
        images = iter(read_frames(given))
        shown = [None if path is None else next(images) for path in paths.values()]
        return "", gr.Row(visible=bool(given)), *[image if image is None else shrink(image) for image in shown]

    def shrink(image: "np.ndarray") -> "np.ndarray":
        from flow_inference.pair_images import resize_image

        return resize_image(image, min(SHOWN_SIDE // 2, max(image.shape[:2])))

    @reports_errors(13 + len(PAIR_FORMATS), hides_result=True)
    def run(request: gr.Request, path1: str | None, path2: str | None, backward: bool, *chosen: Any) -> tuple:
        from flow_inference.cancellation import cancellable

        if path1 is None or path2 is None:
            raise ValueError("Give two frames: drop an image on each field, or click an example.")
        for path, name in ((path1, "frame 1"), (path2, "frame 2")):
            check_image(path, name)
        settings = make_settings(chosen)
        with workspace.lock:
            model = choose_model(settings, args.model, args.host not in LOOPBACK)
            workspace.new_stop_event(request.session_hash)
            stop = workspace.stop_event(request.session_hash)
            folder = workspace.new_folder()
            with cancellable(model, stop.is_set):
                done, text, wheel = predict_two_frames(path1, path2, settings, model, backward, folder)
        choices = [name for name, (key, _) in VIEWS.items() if key in done.views]
        files = [folder / name for name in PAIR_FORMATS.values()]
        return (
            "",
            gr.Column(visible=True),
            done,
            text,
            gr.Radio(choices, value="Flow"),
            (image_path(done, "frame1"), image_path(done, "flow")),
            VIEWS["Flow"][1],
            wheel,
            image_path(done, "frame1"),
            image_path(done, "frame2"),
            "",
            None,
            None,
            python_code(path1, path2, settings, backward),
            *[gr.DownloadButton(value=str(path), interactive=path.is_file()) for path in files],
        )

    def show_view(done: PairJob, name: str) -> tuple:
        key, explanation = VIEWS[name]
        return (image_path(done, "frame1"), image_path(done, key)), explanation

    @reports_errors(3)
    def show_pixel(done: PairJob, x: float, y: float) -> tuple:
        return "", *pixel_at(done, x, y)

    def pixel_of_click(done: PairJob, event: gr.SelectData) -> tuple[int, int]:
        """The pixel of the frame under a click on its image, which has another size."""
        height, width = done.size
        ratio = max(height, width) / SHOWN_SIDE
        return min(int(event.index[0] * ratio), width - 1), min(int(event.index[1] * ratio), height - 1)

    def load_example(index: int) -> tuple[str, str]:
        first = str(pairs[index])
        return first, first.replace("_1.", "_2.")

    result_outputs = [
        *(message, result, job, summary, view, slider, caption, scale, marked1, marked2, pixel_text, x, y, code),
        *downloads,
    ]
    inputs = [file1, file2, backward, *settings]
    run_options = {"inputs": inputs, "outputs": result_outputs, "show_progress_on": [message], **job_options}
    for file in (file1, file2):
        file.change(
            show_files, [file1, file2], [file_message, previews, preview1, preview2], show_progress="hidden", **private
        )
    compute.click(run, trigger_mode="multiple", **run_options)
    examples.click(load_example, examples, [file1, file2], **private).then(run, **run_options)
    share.change(lambda value: gr.ImageSlider(slider_position=value), share, slider, show_progress="hidden", **private)
    view.change(show_view, [job, view], [slider, caption], show_progress="hidden", **private)
    pixel_outputs = [message, pixel_text, marked1, marked2]
    for number in (x, y):
        number.submit(show_pixel, [job, x, y], pixel_outputs, show_progress="hidden", **private)
    marked1.select(pixel_of_click, job, [x, y], show_progress="hidden", **private).then(
        show_pixel, [job, x, y], pixel_outputs, show_progress="hidden", **private
    )


def make_settings(chosen: Sequence[Any]) -> Settings:
    """Make the settings of the values of their components."""
    updates, side, precision, model, weights = chosen
    return Settings(int(updates), int(side), precision or None, model or "", weights)


def image_path(job: PairJob, name: str) -> str:
    return str(job.folder / f"{name}.jpg")


def video_tab(gr: Any, args: argparse.Namespace, workspace: Workspace, job_options: dict[str, Any]) -> None:
    """Add the tab of a video."""
    private = {"api_visibility": "private"}
    gr.Markdown(
        f"The first {args.max_frames} frames are used, reduced to {MAX_VIDEO_SIDE} px where they are larger. Files of "
        f"up to {MAX_UPLOAD} MB."
    )
    video = gr.Video(label="Video", sources=["upload", "webcam"], elem_id="video", buttons=[])
    clips = sorted(examples_folder().glob("*.mp4"))
    examples = gr.Dataset(
        components=[gr.Video(render=False)],
        samples=[[str(path)] for path in clips],
        label="Examples",
        type="index",
        elem_id="clips",
    )
    settings = settings_of(gr, "video", default_side=512)
    archive_format = gr.Radio(
        list(ZIP_FORMATS), value=".flo", label="Files of flow", info="Of every pair of frames, in one zip file."
    )
    with gr.Row():
        compute = gr.Button("Compute flow", variant="primary", elem_id="compute_video")
        stop = gr.Button("Stop", variant="stop", elem_id="stop")
    message = gr.HTML(elem_id="video_message", min_height=0)
    with gr.Column(visible=False) as result:
        shown = gr.Video(
            label="Frames and flow", interactive=False, autoplay=True, loop=True, elem_id="shown", buttons=[]
        )
        timeline = gr.HTML(elem_id="timeline")
        gr.Markdown("### Downloads")
        with gr.Row():
            downloads = [
                gr.DownloadButton(label, elem_id=name)
                for label, name in (("Frames and flow, .mp4", "get_shown"), ("Flow, .mp4", "get_colors"),
                                    ("Flow of every pair, .zip", "get_zip"))
            ]  # fmt: skip

    def start(request: gr.Request) -> str:
        workspace.new_stop_event(request.session_hash)
        return note("In the queue.")

    @reports_errors(6, hides_result=True)
    def run(request: gr.Request, progress: Any = gr.Progress(), *values: Any) -> tuple:  # noqa: B008  # Gradio's way
        path, zip_format, *chosen = values
        if path is None:
            raise ValueError("Give a video: drop one on the field, record one, or click the example.")
        stop_event = workspace.stop_event(request.session_hash)

        def report(done: int, total: int | None) -> None:
            progress((done, total), desc=f"Pair {done} of {total or '?'}", unit="pairs")

        settings = make_settings(chosen)
        progress(0, desc="Loading the model")
        with workspace.lock:
            model = choose_model(settings, args.model, args.host not in LOOPBACK)
            folder = workspace.new_folder()
            drawing, files, text = predict_video(
                path, settings, model, ZIP_FORMATS[zip_format], folder, stop_event, report, args.max_frames
            )
        if not files:
            return note(text), *[gr.skip()] * 6
        paths = [*map(str, files), *[None] * (3 - len(files))]
        return (
            note(text),
            gr.Column(visible=True),
            paths[0],
            drawing,
            *[gr.DownloadButton(value=path, interactive=path is not None) for path in paths],
        )

    def request_stop(request: gr.Request) -> None:  # the message comes from what is stopped
        workspace.stop_event(request.session_hash).set()

    outputs = [message, result, shown, timeline, *downloads]
    run_options = {
        "inputs": [video, archive_format, *settings],
        "outputs": outputs,
        "show_progress_on": [message],
        **job_options,
    }
    compute.click(start, None, message, queue=False, show_progress="hidden", trigger_mode="multiple", **private).then(
        run, trigger_mode="multiple", **run_options
    )
    stop.click(request_stop, queue=False, show_progress="hidden", **private)
    examples.click(lambda index: str(clips[index]), examples, video, **private)


if __name__ == "__main__":
    main()
