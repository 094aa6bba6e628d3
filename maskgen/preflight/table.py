"""A report as text."""

from collections.abc import Mapping
from typing import Any

_GiB = 2**30


def show(report: Mapping[str, Any]) -> str:
  """Formats the report of `estimate`, with the names that the command line adds."""
  mesh = " x ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
  slices = f"{report['slices']} x " if report["slices"] > 1 else ""
  lines = [
    f"{report['config']} on {slices}{report['topology']} ({report['devices']} x {report['device_kind']})",
    f"mesh {mesh}, batch {report['batch_size']:,}, {report['source']} data",
    "",
    "memory per device, GiB",
  ]
  lines += [_row(name, size / _GiB, ".3f") for name, size in report["state_bytes_per_device"].items()]
  if "activation_bytes_per_device" in report:
    name = "activations, an estimate" if report["activations_are_estimated"] else "activations"
    lines.append(_row(name, report["activation_bytes_per_device"] / _GiB, ".3f"))
  lines += [
    _row("all", report["hbm_bytes_per_device"] / _GiB, ".2f"),
    _row("limit", report["hbm_limit_bytes"] / _GiB, ".2f"),
    "",
    "arithmetic of the model, TFLOP",
    _row("per step", report["flops_per_step"] / 1e12, ",.1f"),
    _row("per image", report["flops_per_image"] / 1e12, ".4f"),
  ]
  if "collectives" in report:
    lines += ["", "collectives per step and device      count         MB"]
    for kind, found in report["collectives"].items():
      lines.append(f"  {kind:<26} {found['count']:>13,} {found['bytes'] / 1e6:>10,.1f}")
    least = report["collective_bytes_lower_bound"] / 1e6
    lines.append(
      f"  they send {sent_bytes(report) / 1e6:,.1f} MB; gradients and parameters need at least {least:,.1f}"
    )
  if "bounds_seconds" in report:
    lines += ["", "lower bounds of seconds per step, and upper bounds of speed"]
    lines += [_row(name, seconds, ".4f") for name, seconds in report["bounds_seconds"].items()]
    lines += [
      _row("all overlap", report["estimated_step_seconds"], ".4f"),
      _row("nothing overlaps", report["step_seconds_without_overlap"], ".4f"),
      _row("images per second, at most", report["images_per_second"], ",.0f"),
      _row("FLOP utilisation, at most", report["mfu_bound"], ".0%"),
    ]
    if (expect := report["expected_step_seconds"]) is not None:
      slower = report["estimated_step_seconds"] / expect
      lines += ["", "seconds per step by the compiler's estimate, and speed to expect"]
      lines += [_row(name, seconds, ".4f") for name, seconds in report["expected_seconds"].items()]
      lines += [
        _row("step, expect", expect, ".4f"),
        _row("images per second, expect", report["images_per_second"] * slower, ",.0f"),
        _row("FLOP utilisation, expect", report["mfu_bound"] * slower, ".0%"),
      ]
  lines += ["", f"compiled in {report['compile_seconds']:.0f} s; {verdict(report)}"]
  return "\n".join(lines)


def _row(name: str, value: float, form: str) -> str:
  return f"  {name:<26} {value:>13{form}}"


def sent_bytes(report: Mapping[str, Any]) -> float:
  """Bytes that collectives send from each device in large groups; an all-reduce sends its operand twice."""
  return sum((1 + (kind == "all-reduce")) * found["bytes"] for kind, found in report["collectives"].items())


def verdict(report: Mapping[str, Any]) -> str:
  """One line: whether the step fits, or what makes it fit."""
  if report["fits"]:
    return "fits"
  if report["remedy"] is None:
    return (
      "does not fit, and neither more fsdp, remat nor accumulation makes it fit: use more or larger devices"
    )
  return f"does not fit; it fits with {report['remedy']}"
