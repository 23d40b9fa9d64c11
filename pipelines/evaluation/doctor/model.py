"""Findings about a model from a probe: whether it uses its images, collapsed and dead queries, truncated texts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipelines.evaluation.doctor.findings import Finding, Status, listed
from pipelines.evaluation.doctor.probe import ModelFigures
from qformer.analysis.image_use import MIN_PAIRS, SIGNIFICANT_Z, PairedFigures
from qformer.analysis.queries import COLLAPSED
from qformer.analysis.query_use import DEAD_SPREAD, QueryFigures

_WHAT = {"itc": "similarity", "itm": "match probability", "lm": "loss a token"}
_PAIRS_ADVICE = (
    "see whether captions and media belong together (open some rows of the manifest); if they do, train longer or "
    "start stage 2 from a trained stage 1 (init_from)"
)
_MAX_TRUNCATED_SHARE = 0.05


def image_use(figures: ModelFigures, *, rows: str, weights: Mapping[str, float]) -> Finding:
    """Whether the model uses its images.

    Args:
        figures: Figures of the probe.
        rows: Name of the probed rows, e.g. "split 'val'".
        weights: Weight of each loss term in training; a term of weight 0 was not trained and does not count.
    """
    measures = {name: one for name, one in figures.measures.items() if weights.get(name, 1.0) > 0}
    verdicts = {name: one.verdict for name, one in measures.items()}
    text_of_measures = "; ".join(_describe(name, one) for name, one in measures.items())
    if figures.picked is not None and figures.picked_chance is not None and "itc" in measures:
        text_of_measures += (
            f"; picks its own text out of a batch {figures.picked:.0%} of the time (chance {figures.picked_chance:.0%})"
        )
    values = {
        "verdicts": verdicts,
        "measures": {name: dataclasses.asdict(one) for name, one in figures.measures.items()},
        "picked": figures.picked,
        "picked_chance": figures.picked_chance,
        "rows": rows,
    }
    if not measures or "unknown" in verdicts.values():
        count = max((one.num_pairs for one in measures.values()), default=0)
        text = (
            f"only {count} texts on {rows} could be paired with a wrong image; {MIN_PAIRS} are needed to say anything"
        )
        return Finding(topic="image use", status="unknown", text=text, advice="give more rows", figures=values)
    status: Status = "ok"
    if set(verdicts.values()) == {"unused"}:
        status, words, advice = "problem", "the model does not use the images", _PAIRS_ADVICE
    elif "used" not in verdicts.values():
        status, words, advice = "warning", "the model hardly uses the images", _PAIRS_ADVICE
    elif idle := [name for name, verdict in verdicts.items() if verdict != "used"]:
        terms = " and ".join(name.upper() for name in idle)
        status, words = (
            "warning",
            f"the model uses the images, but {terms} hardly differs between true and wrong pairs",
        )
        advice = f"train longer, or raise optim.loss_weights.{idle[0]}; do not rely on {terms} until then"
    else:
        words, advice = "the model uses the images", ""
    text = f"{words}, on {rows}: {text_of_measures}"
    return Finding(topic="image use", status=status, text=text, advice=advice, figures=values)


def queries(figures: ModelFigures) -> list[Finding]:
    """Whether the queries have collapsed, and which of them do not change with the image."""
    found = figures.queries
    if found is None:
        text = "there are no rows to check them with"
        return [Finding(topic=topic, status="unknown", text=text) for topic in ("collapse of queries", "dead queries")]
    return [_collapse(found), _dead(found, figures)]


def texts_cut(figures: ModelFigures) -> Finding:
    """Whether captions and prompts fit into `max_text_tokens`."""
    share = figures.num_truncated / max(1, figures.num_texts)
    is_bad = share > _MAX_TRUNCATED_SHARE
    return Finding(
        topic="texts cut",
        status="warning" if is_bad else "ok",
        text=f"{figures.num_truncated} of the {figures.num_texts} texts looked at lose their last words",
        advice="raise model.max_text_tokens" if is_bad else "",
        figures={"share": share},
    )


def _describe(name: str, one: PairedFigures) -> str:
    return (
        f"{_WHAT[name]} {one.true_mean:.3f} with the right image and {one.permuted_mean:.3f} with another's, the right "
        f"one fits better for {one.share:.0%} of {one.num_pairs} texts (chance 50%, z {one.z:.1f}; by chance below "
        f"{SIGNIFICANT_Z:g})"
    )


def _collapse(found: QueryFigures) -> Finding:
    limit = f"at most {COLLAPSED:g} is healthy"
    values: dict[str, Any] = {"cosine": found.cosine}
    if found.num_queries == 1:
        return Finding(topic="collapse of queries", status="ok", text="there is only one query", figures=values)
    if found.has_collapsed:
        return Finding(
            topic="collapse of queries",
            status="problem",
            text=f"the {found.num_queries} queries have collapsed: mean pairwise cosine {found.cosine:.2f} ({limit})",
            advice="lower optim.learning_rate, or set optim.loss_weights.diversity to 0.1, and train again",
            figures=values,
        )
    text = f"{found.num_queries} queries differ: mean pairwise cosine {found.cosine:.2f} ({limit})"
    return Finding(topic="collapse of queries", status="ok", text=text, figures=values)


def _dead(found: QueryFigures, figures: ModelFigures) -> Finding:
    dead = found.dead
    values = {"dead": dead, "spread": found.spread, "never_nearest": figures.unread_queries}
    smallest = f"smallest spread {min(found.spread):.3f} of a query's length, dead is below {DEAD_SPREAD:g}"
    nearest = ""
    if figures.unread_queries:
        count = len(figures.unread_queries)
        nearest = f"; {count} of them were never the nearest to a text, as many of a healthy model are"
    if not dead:
        text = f"every one of {found.num_queries} queries changes with the image ({smallest}){nearest}"
        return Finding(topic="dead queries", status="ok", text=text, figures=values)
    all_dead = len(dead) == found.num_queries
    return Finding(
        topic="dead queries",
        status="problem" if all_dead else "warning",
        text=f"{len(dead)} of {found.num_queries} queries say the same of every image: {listed(dead, 8)} ({smallest})",
        advice="use fewer queries (model.qformer.num_queries), or train longer"
        if not all_dead
        else "nothing of the image reaches the model: look at the encoder's features, and lower optim.learning_rate",
        figures=values,
    )
