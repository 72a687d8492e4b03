"""The result of scripts/benchmark.py for the terminal."""

from typing import Any

from resnet_in1k.utils.format import count


def table(result: dict[str, Any]) -> str:
    """The result for the terminal."""

    def rate(row: dict[str, Any], name: str) -> str:
        low, high = row[f"{name}_range"]
        return f"{row[name]:,.1f} ({low:,.1f} to {high:,.1f})"

    lines = [
        f"{result['what']}: images/s, median of {result['repetitions']} interleaved repetitions (min to max)",
        f"  {result['hardware']}, {result['cpu_threads']} CPU threads, torch {result['versions']['torch']}, "
        f"commit {result['commit']}",
        f"  {result['model']}, batch {result['batch_size']}, {result['image_size']} px, {result['precision']}",
    ]
    if "parts" in result:
        width, base = max(map(len, result["parts"])), result["base"]
        lines += [
            f"  {name:<{width}}  {rate(result, name)}" + (f"   {share:.2f} of {base}" if name != base else "")
            for name, share in result["parts"].items()
        ]
        return "\n".join(lines)
    if result["what"] == "input":
        for row in result["sweep"]:
            lines += [
                f"  {count(row['workers'], 'worker')}",
                f"    ours         {rate(row, 'ours')}",
                f"    tutorial     {rate(row, 'tutorial')}   ours is {row['ratio']:.2f} times that",
                f"    decode only  {rate(row, 'decode_only')}   ours is {row['share_of_decode_only']:.2f} of that",
            ]
        lines.append(f"  augmentation on the device, counted apart: {result['augment']:,.0f}")
    elif result["num_processes"] > 1:
        lines.append(f"  ours                   {rate(result, 'ours')}")
        lines.append(f"  without communication  {rate(result, 'without_communication')}")
        lines.append(f"  one process alone      {rate(result, 'one_process')}")
        lines.append(describe_communication(result))
        return "\n".join(lines)
    else:
        lines.append(f"  ours         {rate(result, 'ours')}")
        lines.append(f"  tutorial     {rate(result, 'tutorial')}   ours is {result['ratio']:.2f} times that")
    if result["what"] == "step":
        lines.append(f"  bare loop    {rate(result, 'bare')}   our overhead is {result['overhead']:.1%}")
    if result["what"] == "train":
        waited = f"waited for data {result['waiting_share']:.1%} of the time"
        lines.append(f"  {waited}, with {count(result['workers'], 'worker')}: {result['advice']}")
    return "\n".join(lines)


def describe_communication(result: dict[str, Any]) -> str:
    """The result of several processes for the terminal."""
    counted = ", ".join(f"{number} {name}" for name, number in result["collectives_per_step"].items())
    return (
        f"  of {result['num_processes']} processes together; communication takes {result['communication_share']:.1%}, "
        f"scaling efficiency {result['scaling_efficiency']:.2f}; a step's collectives: {counted}"
    )
