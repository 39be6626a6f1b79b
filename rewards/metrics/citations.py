"""What final messages cite, against the evidence: precision, recall, coverage (BrowseComp-Plus).

The publication averages precision and recall over answers that cite something; the mean over all answers and the share that cite stand beside
them, since an agent that cites once and well would look best.

Invariants: mean over all = coverage * mean over those that cite; a made-up citation lowers precision; citing a document twice changes nothing.
Source: BrowseComp-Plus' evaluation code (confirmed).
"""

from __future__ import annotations

from agents.text import canonical_id, cited_ids, cut_references
from agents.types import Task, Trajectory, Verdict
from rewards.metrics.base import Context, Scores, docs_seen
from rewards.metrics.evidence import judged_docs


def citation_score(task: Task, trajectory: Trajectory, verdict: Verdict | None, context: Context) -> Scores:
    """Precision and recall of the documents that the final message cites; `citation_seen`: share of them that the run was shown.

    A list of references at its end cites nothing: neither its numbers nor its titles are citations.
    Precision, recall and seen are None when nothing is cited; the `_all` forms are 0 then. Without known evidence only coverage and seen
    are defined.
    """
    evidence = {canonical_id(doc_id) for doc_id in judged_docs(task, context)}
    shown = docs_seen(trajectory)
    cited = {canonical_id(target) for target in cited_ids(cut_references(trajectory.message), sorted(evidence | shown))}
    precision = len(cited & evidence) / len(cited) if cited and evidence else None
    recall = len(cited & evidence) / len(evidence) if cited and evidence else None
    return {
        "citation_precision": precision,
        "citation_recall": recall,
        "citation_coverage": float(bool(cited)),
        "citation_precision_all": (precision or 0.0) if evidence else None,
        "citation_recall_all": (recall or 0.0) if evidence else None,
        "citation_seen": len(cited & shown) / len(cited) if cited else None,
    }
