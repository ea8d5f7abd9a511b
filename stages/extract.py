"""`lora-pipe extract`: a training run's result, a tuned model or a larger adapter becomes a portable adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_pipeline.adapters.header import read_header
from lora_pipeline.adapters.recognition import recognise
from lora_pipeline.errors import CorruptError, ParamsError, UsageError
from lora_pipeline.keeping import file_digest
from lora_pipeline.params import load_params
from stages._extraction_report import write_report
from stages._rank_rule import rule_of
from stages._stage import PARAMS, entry, stage

if TYPE_CHECKING:
    from lora_pipeline.adapters.adapter import Json
    from lora_pipeline.adapters.distillation import Recipe
    from lora_pipeline.adapters.extraction import Extraction
    from lora_pipeline.adapters.ranks import RankRule
    from lora_pipeline.params import ConceptParams

_WAYS = "give one of --rank, --energy, --error, --ratio, --threshold and --max-rank"


def extract(  # noqa: PLR0913 - the options of a command
    out: Annotated[Path, typer.Option(help="The adapter to write.")],
    source: Annotated[
        Path | None, typer.Argument(help="By hand: a tuned model (give --base), or an adapter to cut down.")
    ] = None,
    concept: Annotated[str | None, typer.Option(help="A concept of params.yaml.")] = None,
    tuned: Annotated[Path | None, typer.Option(help="The folder `train` wrote for the concept.")] = None,
    base: Annotated[Path | None, typer.Option(help="The base it was trained on or tuned from.")] = None,
    rank: Annotated[int | None, typer.Option(help="Keep this rank in every layer.")] = None,
    energy: Annotated[float | None, typer.Option(help="Keep this share of each layer's energy, as 0.95.")] = None,
    error: Annotated[float | None, typer.Option(help="Lose no more than this of each layer, as 0.1.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Keep singular values above this share of the largest.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Keep singular values above this.")] = None,
    max_rank: Annotated[int | None, typer.Option(help="No rank above this, whatever else is asked.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Every layer's alpha; by itself it is the rank.")] = None,
    targets: Annotated[list[str] | None, typer.Option(help="Of a model, only layers that match a glob.")] = None,
    device: Annotated[str, typer.Option(help="Where a model's layers are decomposed: cpu or cuda.")] = "cpu",
    clamp_quantile: Annotated[
        float | None, typer.Option(help="Cut outliers off as other programs do, at 0.99; it adds error.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="JSON of each layer's error; a PNG beside it shows it.")] = None,
) -> None:
    """Take an adapter out of a training run, a tuned model or a larger adapter, cut to the ranks asked for.

    Examples:

        lora-pipe extract --concept zorp --tuned models/tuned/zorp --base models/base --out zorp.safetensors

        lora-pipe extract dreambooth/ --base stable-diffusion/ --energy 0.9 --max-rank 64 --out dreambooth.safetensors

        lora-pipe extract rank64.safetensors --rank 8 --out rank8.safetensors --report rank8.json
    """
    rule = rule_of({"rank": rank, "energy": energy, "error": error, "ratio": ratio, "threshold": threshold}, max_rank)
    options = {"alpha": alpha, "targets": targets, "clamp_quantile": clamp_quantile}
    asked = rule is not None or report is not None or any(value is not None for value in options.values())
    if concept and tuned and base and not source and not asked:
        _of_concept(concept, tuned, base, out)
    elif source and not concept and not tuned:
        outs = (out, *_report_files(report)) if report else (out,)
        if base and not _is_adapter(source):
            _of_model(source, base, _recipe(rule, options), _usable(device), outs)
        else:
            _of_adapter(source, base, rule, options, outs)
    else:
        fix = "see lora-pipe extract --help"
        raise UsageError("extract", "needs either --concept, --tuned and --base alone, or a file", fix)


def _of_concept(concept: str, tuned: Path, base: Path, out: Path) -> None:
    from lora_pipeline.adapters import load_adapter, save_adapter
    from lora_pipeline.adapters.composition import parents
    from lora_pipeline.adapters.dora import plain
    from lora_pipeline.adapters.extraction import extract as taken
    from lora_pipeline.adapters.fingerprint import base_fingerprint
    from lora_pipeline.adapters.ranks import rank_rule
    from lora_pipeline.adapters.weights import open_weights

    def settings() -> ConceptParams:
        return entry(load_params(PARAMS).concepts, "concepts", concept)

    section = settings()
    if (tuned / "model").is_dir():
        _of_full(concept, tuned / "model", base, out, settings)
        return
    source = tuned / "tuned.safetensors"
    with stage(
        "extract", concept, out=out, inputs=[source, base], section=lambda: settings().model_dump(mode="json")
    ) as run:
        trained = load_adapter(source)
        provenance: dict[str, Json] = {
            "code": version("lora-pipeline"),
            "kind": "adapter",
            "params": section.model_dump(mode="json"),
            "parents": parents([("tuned", trained, 1.0)]),
        }
        rule = rank_rule(section.extract.rank)
        if rule is not None and trained.magnitudes:
            trained, _ = plain(trained, open_weights(base), None)
        extraction = taken(trained, rule, provenance, base=base_fingerprint(base))
        save_adapter(extraction.adapter, run.building)
        run.tracker.metric("residual", extraction.residual, 0)
        if rule is not None:
            data, picture = run.work / "extraction.json", run.work / "extraction.png"
            write_report(extraction, data, picture)
            run.tracker.artifact(data)
            run.tracker.artifact(picture)
    _tell(out, extraction)


def _of_full(concept: str, model: Path, base: Path, out: Path, settings: Callable[[], ConceptParams]) -> None:
    """The adapter nearest to weights that were learnt themselves, by the concept's rule."""
    from lora_pipeline.adapters import save_adapter
    from lora_pipeline.adapters.distillation import Recipe, distil
    from lora_pipeline.adapters.fingerprint import base_fingerprint
    from lora_pipeline.adapters.ranks import rank_rule
    from lora_pipeline.adapters.weights import open_weights

    section = settings()
    rule = rank_rule(section.extract.rank)
    if rule is None:
        where = f"params.yaml: concepts.{concept}.extract.rank"
        raise ParamsError(where, "is null, and method full learns whole weights", "write a rank, or {energy: 0.9}")
    with stage(
        "extract", concept, out=out, inputs=[model, base], section=lambda: settings().model_dump(mode="json")
    ) as run:
        before, after = open_weights(base), open_weights(model)
        provenance: dict[str, Json] = {
            "base": base_fingerprint(base),
            "code": version("lora-pipeline"),
            "kind": "adapter",
            "params": section.model_dump(mode="json"),
            "parents": [{"name": "tuned", "sha256": base_fingerprint(model), "weight": 1.0}],
        }
        with run.progress(len(before.places), "parameters") as advance:
            extraction = distil(before, after, Recipe(rule), provenance, advance=advance)
        save_adapter(extraction.adapter, run.building)
        run.tracker.metric("residual", extraction.residual, 0)
        data, picture = run.work / "extraction.json", run.work / "extraction.png"
        write_report(extraction, data, picture)
        run.tracker.artifact(data)
        run.tracker.artifact(picture)
    _tell(out, extraction)


def _of_model(source: Path, base: Path, recipe: Recipe, device: str, outs: Sequence[Path]) -> None:
    from lora_pipeline.adapters import save_adapter
    from lora_pipeline.adapters.distillation import distil
    from lora_pipeline.adapters.fingerprint import base_fingerprint
    from lora_pipeline.adapters.vocabulary import new_tokens
    from lora_pipeline.adapters.weights import open_weights

    def identity(model: Path) -> str:
        return base_fingerprint(model) if model.is_dir() else file_digest(model)

    settings = asdict(recipe)
    with stage("extract", outs[0].stem, out=outs, inputs=[source, base], section=lambda: settings) as run:
        before, after = open_weights(base), open_weights(source)
        folders = (base / "tokenizer", source / "tokenizer")
        tokens = new_tokens(*folders) if all(folder.is_dir() for folder in folders) else {}
        provenance: dict[str, Json] = {
            "code": version("lora-pipeline"),
            "extract": settings,
            "kind": "adapter",
            "parents": [{"name": source.stem, "sha256": identity(source), "weight": 1.0}],
        }
        if base.is_dir():  # a single file is the same base in another form, which no fingerprint tells
            provenance["base"] = base_fingerprint(base)
        with run.progress(len(before.places), "parameters") as advance:
            extraction = distil(before, after, recipe, provenance, tokens=tokens, device=device, advance=advance)
        save_adapter(extraction.adapter, run.building)
        if len(outs) > 1:
            write_report(extraction, *run.outs[1:])
    _tell(outs[0], extraction)


def _of_adapter(
    source: Path, base: Path | None, rule: RankRule | None, options: Mapping[str, Any], outs: Sequence[Path]
) -> None:
    from lora_pipeline.adapters import load_adapter, save_adapter
    from lora_pipeline.adapters.adapter import check_base, check_understood
    from lora_pipeline.adapters.composition import parents
    from lora_pipeline.adapters.extraction import extract as taken
    from lora_pipeline.adapters.fingerprint import base_fingerprint

    if (source / "unet").is_dir():
        raise UsageError(str(source), "is a model, of which only the change from its base can be taken", "give --base")
    if options["targets"] is not None or options["clamp_quantile"] is not None:
        raise UsageError(str(source), "is cut as an adapter; --targets and --clamp-quantile are for models", _WAYS)
    if rule is None and options["alpha"] is None:
        raise UsageError("extract", "is not told how much to keep of the adapter", _WAYS)
    settings: dict[str, Json] = {"alpha": options["alpha"], "rule": asdict(rule) if rule else None}
    inputs = [source, base] if base else [source]
    with stage("extract", outs[0].stem, out=outs, inputs=inputs, section=lambda: settings) as run:
        larger = load_adapter(source)
        check_understood(str(source), larger)
        made_for = base_fingerprint(base) if base and base.is_dir() else None
        if made_for:
            check_base(str(source), larger, made_for)
        provenance: dict[str, Json] = {
            "code": version("lora-pipeline"), "extract": settings, "parents": parents([(source.stem, larger, 1.0)]),
        }  # fmt: skip
        with run.progress(len(larger.factors), "layers") as advance:
            extraction = taken(larger, rule, provenance, base=made_for, alpha=options["alpha"], advance=advance)
        save_adapter(extraction.adapter, run.building)
        if len(outs) > 1:
            write_report(extraction, *run.outs[1:])
    _tell(outs[0], extraction)


def _is_adapter(path: Path) -> bool:
    """Whether a safetensors file is an adapter, and not a model in the names of CompVis."""
    try:
        header = read_header(path)
    except CorruptError:
        return False
    form = recognise({name: entry.shape for name, entry in header.tensors.items()}, header.metadata)
    return form is not None and not any(name.startswith("model.diffusion_model.") for name in header.tensors)


def _report_files(report: Path) -> tuple[Path, Path]:
    """The numbers, and the picture beside them."""
    if report.suffix != ".json":
        raise UsageError(f"--report {report}", "is no name of a JSON file", f"write {report.with_suffix('.json')}")
    return report, report.with_suffix(".png")


def _recipe(rule: RankRule | None, options: dict[str, Any]) -> Recipe:
    from lora_pipeline.adapters.distillation import Recipe

    if rule is None:
        raise UsageError("extract", "is not told how much to keep of the model's change", _WAYS)
    return Recipe(rule, tuple(options["targets"] or ("*",)), options["alpha"], options["clamp_quantile"])


def _usable(device: str) -> str:
    import torch

    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}", "is unknown", "use cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda", "finds no such device", "leave it out to work on the processor")
    return device


def _tell(out: Path, extraction: Extraction) -> None:
    if extraction.residual:
        ranks = sorted({cut.rank for cut in extraction.layers.values()})
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        typer.echo(f"{out}: rank {span} loses {extraction.residual:.1%} of the change")
    if extraction.left_out:
        names = ", ".join(sorted(extraction.left_out, key=extraction.left_out.__getitem__, reverse=True)[:3])
        share = f"{extraction.left_out_share:.1%} of the squared change"
        typer.echo(f"{out}: left out {len(extraction.left_out)} parameters, {share}, above all {names}")
