"""The figures are asked for their texts and lines, and compared with the numbers put in."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from covid_flax.errors import UserError
from covid_flax.evaluation.metrics import classification_report
from covid_flax.report import plots
from covid_flax.report.plots import (
    confusion_matrix_figure,
    curves_figure,
    plot_confusion_matrix,
    plot_curves,
)

NAMES = ["COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"]


def _report(names, matrix):
    labels, predicted = [], []
    for i, row in enumerate(matrix):
        for j, count in enumerate(row):
            labels += [i] * count
            predicted += [j] * count
    probabilities = np.eye(len(names))[predicted]
    return classification_report(np.array(labels), probabilities, names, resamples=0)


def _records(epochs, val_loss=None):
    records = []
    for e in epochs:
        loss = val_loss[e] if val_loss else 1 / e
        records.append(
            {"step": e, "epoch": e, "split": "train", "loss": 2.0 / e, "accuracy": 1 - 0.5 / e}
        )
        records.append(
            {"step": e, "epoch": e, "split": "val", "loss": loss, "accuracy": 0.9 - 0.3 / e}
        )
    return records


def _line(axes, label):
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return line


def test_confusion_matrix_says_what_is_where():
    matrix = [[5, 1, 0, 0], [2, 1300, 0, 1], [0, 0, 3, 0], [0, 0, 0, 0]]
    figure = confusion_matrix_figure(_report(NAMES, matrix), "validation")
    (axes,) = figure.axes
    assert axes.get_ylabel() == "true class" and axes.get_xlabel() == "predicted class"
    assert [t.get_text() for t in axes.get_xticklabels()] == NAMES
    assert [t.get_text() for t in axes.get_yticklabels()] == NAMES
    assert "validation" in axes.get_title() and "99.70 % of 1,312 images" in axes.get_title()
    texts = {t.get_position(): t.get_text() for t in axes.texts}
    assert len(texts) == 16
    # Position (x, y) is (column, row), and row 0 is drawn on top.
    assert texts[(0, 0)] == "5\n83.3 %"
    assert texts[(1, 0)] == "1\n16.7 %"
    assert texts[(0, 1)] == "2\n0.2 %"
    assert texts[(1, 1)] == "1,300\n99.8 %"
    assert texts[(3, 1)] == "1\n0.1 %"
    assert texts[(0, 3)] == "0"  # no images, no percentage
    assert axes.yaxis_inverted()
    np.testing.assert_allclose(axes.images[0].get_array()[1], [2 / 1303, 1300 / 1303, 0, 1 / 1303])


def test_cell_texts_stand_out_from_their_cells():
    figure = confusion_matrix_figure(_report(["a", "b"], [[10, 0], [5, 5]]))
    colors = {t.get_position(): t.get_color() for t in figure.axes[0].texts}
    assert colors[(0, 0)] == "white" and colors[(1, 0)] == "black"


@pytest.mark.parametrize("k", [2, 14])
def test_no_text_of_a_confusion_matrix_leaves_its_place(k):
    names = [f"A long name of a class {i} $x_{i}$" for i in range(k)]
    matrix = np.full((k, k), 1234)
    figure = confusion_matrix_figure(_report(names, matrix))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    cell = axes.get_window_extent().width / k
    for text in axes.texts:
        box = text.get_window_extent()
        assert box.width < cell and box.height < cell
    for label in [*axes.get_xticklabels(), *axes.get_yticklabels(), axes.title]:
        box = label.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0
        assert box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
    shown = [t.get_text().replace("\n", " ") for t in axes.get_yticklabels()]
    assert shown == names


def test_a_matrix_of_many_classes_holds_counts_alone():
    k = 30
    matrix = np.eye(k, dtype=int) * 1234
    matrix[3, 4] = 7
    figure = confusion_matrix_figure(_report([f"c{i}" for i in range(k)], matrix))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert sorted({t.get_text() for t in axes.texts}) == ["1,234", "7"]
    assert len(axes.texts) == k + 1
    cell = axes.get_window_extent().width / k
    assert all(t.get_window_extent().height < cell for t in axes.texts)


def test_names_that_the_font_cannot_write_are_numbered(tmp_path, recwarn, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    plot_confusion_matrix(_report(["肺炎", "正常"], [[3, 1], [0, 4]]), tmp_path / "x.png")
    plot_confusion_matrix(_report(["Lésion", "σ"], [[3, 1], [0, 4]]), tmp_path / "x.png")
    shown = [[t.get_text() for t in figure.axes[0].get_yticklabels()] for figure in drawn]
    assert shown[0] == ["class 1 of report.json", "class 2 of report.json"]
    assert shown[1] == ["Lésion", "σ"] and not recwarn.list


def test_a_long_name_without_a_space_leaves_room_for_the_matrix():
    figure = confusion_matrix_figure(_report(["x" * 90, "y" * 60], [[3, 1], [0, 4]]))
    figure.draw_without_rendering()
    assert figure.axes[0].get_window_extent().width > 0.4 * figure.bbox.width


def test_curves_hold_the_numbers_and_mark_the_best_epoch():
    val_loss = {1: 0.9, 2: 0.4, 3: 0.4, 4: 0.7}
    records = _records(range(1, 5), val_loss)
    accuracy, loss = curves_figure(records).axes
    for axes, key in ((accuracy, "accuracy"), (loss, "loss")):
        assert axes.get_xlabel() == "epoch" and axes.get_ylabel() == key
        for split, label in (("train", "training"), ("val", "validation")):
            x, y = _line(axes, label).get_data()
            assert list(x) == [1, 2, 3, 4]
            assert list(y) == [r[key] for r in records if r["split"] == split]
        assert list(_line(axes, "best epoch (2)").get_xdata()) == [2, 2]
        assert len(axes.get_legend().get_texts()) == 3
    marked = _line(curves_figure(records, best_epoch=4).axes[1], "best epoch (4)")
    assert list(marked.get_xdata()) == [4, 4]


def test_curves_of_a_resumed_run_count_the_last_record_of_an_epoch():
    records = _records([1, 2]) + _records([2], {2: 9.0})
    x, y = _line(curves_figure(records).axes[1], "validation").get_data()
    assert list(x) == [1, 2] and list(y) == [1.0, 9.0]


def test_curves_pass_over_nan_when_they_look_for_the_best():
    figure = curves_figure(_records([1, 2, 3], {1: math.nan, 2: 0.5, 3: 0.6}))
    _line(figure.axes[1], "best epoch (2)")
    figure = curves_figure(_records([1], {1: math.nan}))
    assert not [line for line in figure.axes[1].lines if "best" in line.get_label()]


@pytest.mark.parametrize("epochs", [1, 2, 100])
def test_epoch_ticks_are_whole_numbers_and_points_are_visible(epochs):
    figure = curves_figure(_records(range(1, epochs + 1)))
    figure.draw_without_rendering()
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = [t for t in axes.get_xticks() if low <= t <= high]
        assert ticks and all(t == round(t) for t in ticks) and len(ticks) <= 12
        assert low < 1 and high > epochs
        if epochs == 1:
            assert _line(axes, "validation").get_marker() == "o"


def test_training_records_alone_are_drawn():
    records = [r for r in _records([1, 2]) if r["split"] == "train"]
    for axes in curves_figure(records).axes:
        assert [line.get_label() for line in axes.lines] == ["training"]


def test_files_are_png_and_replace_the_old_ones(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.dumps(record) + "\n" for record in _records([1, 2])]
    metrics.write_text("".join(lines) + '{"step": 3, "ep')  # killed while writing
    for name in ("curves.png", "matrix.png"):
        (tmp_path / name).write_text("old")
    plot_curves(metrics, tmp_path / "curves.png")
    plot_confusion_matrix(_report(["a", "b"], [[1, 2], [3, 4]]), tmp_path / "matrix.png")
    for name in ("curves.png", "matrix.png"):
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG" and image.width >= 800
            image.load()
    assert len(list(tmp_path.iterdir())) == 3


def test_bad_metrics_files_are_named(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    with pytest.raises(UserError, match="metrics.jsonl"):
        plot_curves(metrics, tmp_path / "curves.png")
    metrics.write_text("")
    with pytest.raises(UserError, match="no metrics"):
        plot_curves(metrics, tmp_path / "curves.png")
    good = json.dumps(_records([1])[0])
    for bad in ("{]", "[]", '{"epoch": 1}'):
        metrics.write_text(f"{good}\n{bad}\n{good}\n")
        with pytest.raises(UserError, match="line 2"):
            plot_curves(metrics, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_figures_leave_pyplot_alone():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    confusion_matrix_figure(_report(["a", "b"], [[1, 0], [0, 1]]))
    curves_figure(_records([1]))
    assert plt.get_fignums() == before
