"""The diagnostics as people read them: a table, pictures, and a fragment of HTML."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from megadistill.plots import Histogram, save_png

Values = Mapping[str, Any]  # the JSON of the diagnostics
MOST_CHARACTERS = 1500


def write_report(directory: Path, values: Values) -> None:
    """`refinement.txt`, `refinement.png` and `refinement.html` beside `refinement.json`."""
    rows = table_rows(values)
    width = max(len(name) for name, _ in rows)
    text = "".join(f"{name:<{width}}  {value}\n" for name, value in rows)
    (directory / "refinement.txt").write_text(text, encoding="utf-8")
    draw(directory / "refinement.png", values)
    (directory / "refinement.html").write_text(html_fragment(values, rows), encoding="utf-8")


def table_rows(values: Values) -> list[tuple[str, str]]:
    """(quantity, value) of every figure."""
    embedding, nll, length = values["embedding"], values["base_nll"], values["length"]
    rows = [
        ("records measured", f"{values['records']}, {values['changed']} of them changed"),
        ("embedding divergence 1 - cos(y, refined)", _number(embedding["divergence"])),
        ("... of changed records", _number(embedding["divergence_of_changed"])),
        ("MMD² to the base model, raw", _number(embedding.get("mmd2_raw"))),
        ("MMD² to the base model, refined", _number(embedding.get("mmd2_refined"))),
        ("base-model NLL per token, raw -> refined", _paired(nll)),
        *(
            (f"{name.replace('_', ' ')} of changed records", _number(value))
            for name, value in values["overlap"].items()
        ),
        ("length ratio in tokens", _number(length["mean_ratio"])),
        ("length: Kolmogorov-Smirnov", f"{length['ks']:.3f} (p = {length['ks_p']:.3g})"),
        ("length: Wasserstein-1 in tokens", _number(length["wasserstein"])),
        *(
            (f"{name} per 100 tokens, raw -> refined", _paired(found))
            for name, found in values["style"].items()
        ),
    ]
    pairs = values["judges"].get("agreement", [])
    return rows + [(f"judges {' and '.join(pair['judges'])}", _agreement(pair)) for pair in pairs]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _paired(found: Values) -> str:
    if "before" not in found:
        return "-"
    return (
        f"{found['before']:.3f} -> {found['after']:.3f}, difference {found['difference']:+.3f} "
        f"[{found['low']:+.3f}, {found['high']:+.3f}], p = {found['p']:.3g}"
    )


def _agreement(pair: Values) -> str:
    return (
        f"{pair['candidates']} candidates, mean |difference| "
        f"{pair['mean_absolute_difference']:.3f}, correlation {_number(pair['correlation'])}, "
        f"kappa at the bar {_number(pair['kappa'])}"
    )


def draw(file: Path, values: Values) -> None:
    """Similarities, lengths, NLL and judges' scores in one picture."""
    series: dict[str, Mapping[str, Sequence[float]]] = {
        "cosine similarity of rewrites": {"rewrites": values["similarity"]},
        "length in tokens": _sides(values["length"]["values"], "tokens"),
        "NLL per token under the base model": _sides(values["base_nll"]["values"], "nll"),
        "judges' scores": values["judges"].get("scores", {}),
    }
    save_png(file, [Histogram(title=title, series=found) for title, found in series.items()])


def _sides(found: Mapping[str, Sequence[float]], what: str) -> dict[str, Sequence[float]]:
    return {"raw": found[f"raw_{what}"], "refined": found[f"refined_{what}"]}


def html_fragment(values: Values, rows: Sequence[tuple[str, str]]) -> str:
    """A `<section>` for a larger page; the picture lies beside it."""
    blocks = "".join(
        f"<h3>{title}</h3>\n" + "".join(_example(found) for found in values["examples"][kind])
        for kind, title in (
            ("worst", "Furthest from their answers"),
            ("best", "Nearest to their answers"),
        )
    )
    return (
        '<section class="refinement">\n<h2>Refinement</h2>\n'
        f"{pd.DataFrame(rows).to_html(header=False, index=False, border=0)}\n"
        '<img src="refinement.png" alt="similarities, lengths, NLL and scores">\n'
        f"{blocks}</section>\n"
    )


def _example(found: Values) -> str:
    texts = {name: _shortened(found[name]) for name in ("original", "rewrite", "refined")}
    return (
        f"<details><summary>{html.escape(_shortened(found['question']))} "
        f"(similarity {found['similarity']:.3f}, {found['decision']})</summary>\n"
        # By str, because pandas would show the end of a line as two characters.
        f"{pd.DataFrame([texts]).to_html(index=False, border=0, formatters=[str] * 3)}</details>\n"
    )


def _shortened(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} ..."
