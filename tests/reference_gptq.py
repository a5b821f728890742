"""GPTQ as the paper states it (Frantar et al. 2022, eq. 2 and 3), in float64, one column and one inverse at a time."""

import torch

CLIPS = [torch.tensor(1.0 - 0.02 * step, dtype=torch.float32).double() for step in range(36)]


def gptq(w, hessian, parts, damp=0.01, act_order=False):
    """Codes [O, C] and scales [O, G] of each part (columns, bits, group_size, clip [O, G] or None to search it).

    A part of bits None is not quantized: it gives its values and no scale.
    """
    w, remaining_hessian = w.double().clone(), hessian.double().clone()
    diagonal = remaining_hessian.diagonal()
    mean, loud = diagonal.mean(), diagonal.clone()
    diagonal[diagonal == 0] = 1
    diagonal += damp * mean

    results, start = [], 0
    for columns, bits, group_size, clip in parts:
        part = list(range(start, start + columns))
        order = sorted(part, key=lambda i: -loud[i].item()) if act_order else part
        group_size = group_size or columns
        codes = torch.zeros(len(w), columns, dtype=torch.float64)
        scales = {}
        for step, i in enumerate(order):
            if bits is None:
                codes[:, i - start] = w[:, i]
                continue
            group = (i - start) // group_size
            for later in range(columns // group_size) if act_order and step == 0 else [group]:
                if later not in scales:
                    first = start + later * group_size
                    values = w[:, first : first + group_size]
                    scales[later] = scale_of(values, bits, None if clip is None else clip[:, later].double())
            code = (w[:, i] / scales[group]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            codes[:, i - start] = code
            left = [j for j in range(w.shape[1]) if j not in order[:step] and j >= start]
            inverse = torch.linalg.inv(remaining_hessian[left][:, left])
            at = left.index(i)
            w[:, left] -= torch.outer(w[:, i] - code * scales[group], inverse[at] / inverse[at, at])
        results.append((codes, None if bits is None else torch.stack([scales[g] for g in sorted(scales)], dim=1)))
        start += columns
    return results


def scale_of(values, bits, clip):
    """Scale [O] of one group [O, g] at its clip values [O], or at each row's best of `CLIPS`."""
    reach = values.abs().amax(1) / (2 ** (bits - 1) - 1)
    if clip is not None:
        return reach * clip
    candidates = torch.stack([reach * c for c in CLIPS])
    errors = []
    for scale in candidates:
        codes = (values / scale[:, None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        errors.append(((codes * scale[:, None] - values) ** 2).sum(1))
    best = torch.stack(errors).argmin(0)
    return candidates[best, torch.arange(len(values))]


def output_error(w, w_hat, hessian):
    """What GPTQ lowers: trace((W − Ŵ) H (W − Ŵ)ᵀ)."""
    difference = (w - w_hat).double()
    return (difference @ hessian.double() * difference).sum().item()
