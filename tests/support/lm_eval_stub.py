"""Stands for lm-evaluation-harness 0.4 where that is not installed: the names that
deepseek_jax.inference.lm_eval uses, with the same results."""

import copy
import sys
import types


class TemplateLM:
    """lm_eval.api.model.TemplateLM: `loglikelihood` by way of `tok_encode` and `_loglikelihood_tokens`."""

    def __init__(self):
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *_: None)

    def loglikelihood(self, requests, disable_tqdm=False):
        out = []
        for context, continuation in (r.args for r in requests):
            if context:
                spaces = len(context) - len(context.rstrip())
                if spaces:
                    context, continuation = context[:-spaces], context[-spaces:] + continuation
                first = self.tok_encode(context)
                out.append(
                    (
                        (context, continuation),
                        first,
                        self.tok_encode(context + continuation)[len(first) :],
                    )
                )
            else:
                out.append(
                    (
                        (context, continuation),
                        [self.prefix_token_id],
                        self.tok_encode(continuation, add_special_tokens=False),
                    )
                )
        return self._loglikelihood_tokens(out, disable_tqdm=disable_tqdm)


def get_rolling_token_windows(token_list, prefix_token, max_seq_len, context_len):
    """As in lm_eval.utils: (inputs, predictions), the last window with as much context as fits."""
    size = min(max_seq_len, len(token_list))
    if token_list:
        yield [prefix_token, *token_list[: size - 1]], token_list[:size]
    while size < len(token_list):
        count = min(len(token_list) - size, max_seq_len - context_len + 1)
        size += count
        yield token_list[size - max_seq_len - 1 : size - 1], token_list[size - count : size]


def make_disjoint_window(pair):
    return pair[0][: len(pair[0]) - len(pair[1]) + 1], pair[1]


def normalize_gen_kwargs(given, default=256):
    out = copy.deepcopy(given)
    until = out.get("until", [])
    out["until"] = until if isinstance(until, list) else [until]
    out["max_gen_toks"] = int(out.get("max_gen_toks", default))
    out["do_sample"] = out.get("do_sample", bool(out.get("temperature", 0)))
    out["temperature"] = out.get("temperature", 0.0) if out["do_sample"] else 0.0
    return out


def install(monkeypatch):
    """Makes `import lm_eval` find these, unless the harness is there."""
    try:
        import lm_eval  # noqa: F401

        return
    except ImportError:
        pass
    modules = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.models": {},
        "lm_eval.api.model": {"TemplateLM": TemplateLM},
        "lm_eval.utils": {
            "get_rolling_token_windows": get_rolling_token_windows,
            "make_disjoint_window": make_disjoint_window,
        },
        "lm_eval.api.registry": {"register_model": lambda name: lambda c: c},
        "lm_eval.models.utils": {"normalize_gen_kwargs": normalize_gen_kwargs},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
