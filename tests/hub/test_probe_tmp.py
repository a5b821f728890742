import torch, traceback
from transformers import AutoModelForCausalLM
from tests.hub.test_generate import *
def attempt(name, f):
    try: print("PROBE", name, f())
    except BaseException as e: print("PROBE", name, "EXC", type(e).__name__, str(e)[:300])
def test_probe(exact, run_of):
  for name in ("llama, bisup, text prompt","llama, rtn, stored bfloat16","mistral, quarot, rtn, window"):
    m=exact(name); P=prompt_of(m); ids=tokens(9); n=P.shape[1]; print("P",n)
    # multi turn
    def multi():
        out=m.generate(ids, do_sample=False, pad_token_id=PAD, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True, attention_mask=torch.ones_like(ids))
        full=torch.cat([out.sequences, tokens(6,seed=3)],1)
        want=greedy(m,full)
        got=greedy(m,full,past_key_values=out.past_key_values)
        return torch.equal(want,got)
    attempt("multi-turn full ids", multi)
    def multi2():
        w=torch.cat([P,ids],1)
        out=m.generate(w, do_sample=False, pad_token_id=PAD, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True, attention_mask=torch.ones_like(w))
        full=torch.cat([out.sequences, tokens(6,seed=3)],1)
        return torch.equal(greedy(m,full), greedy(m,full,past_key_values=out.past_key_values))
    attempt("multi-turn held", multi2)
    def padheld():
        texts=[torch.cat([P,tokens(k,seed=k)],1) for k in (4,9)]
        L=max(t.shape[1] for t in texts); b=torch.full((2,L),PAD); mask=torch.zeros_like(b)
        for r,t in enumerate(texts): b[r,L-t.shape[1]:]=t; mask[r,L-t.shape[1]:]=1
        g=greedy(m,b,attention_mask=mask)
        return [torch.equal(g[r],greedy(m,texts[r])[0]) for r in range(2)]
    attempt("padded held", padheld)
    def mixed():
        a=torch.cat([P,tokens(9)],1); b=tokens(9+n,seed=5); g=greedy(m,torch.cat([a,b]))
        return torch.equal(g[0],greedy(m,a)[0]), torch.equal(g[1],greedy(m,b)[0])
    attempt("mixed", mixed)
    def only():
        # prompt alone: expected continuation: last prompt token's logits attending to exact prefix
        x=m(input_ids=P).logits.shape
        # from P + next: the held mode gives logits at prompt's last place
        with torch.no_grad():
            held=m(input_ids=torch.cat([P,ids],1)).logits[:, n-1]
            alone=m(input_ids=P).logits[:, -1]
        return torch.allclose(held,alone,atol=1e-6)
    attempt("prompt alone", only)
    attempt("chunked prefill", lambda: torch.equal(greedy(m,ids,prefill_chunk_size=4), greedy(m,ids)))
    def chunkheld():
        w=torch.cat([P,tokens(9)],1)
        return torch.equal(greedy(m,w,prefill_chunk_size=2), greedy(m,w))
    attempt("chunked prefill held", chunkheld)
    def slidepad():
        texts=[tokens(k,seed=k) for k in (4,9)]
        L=9; b=torch.full((2,L),PAD); mask=torch.zeros_like(b)
        for r,t in enumerate(texts): b[r,L-t.shape[1]:]=t; mask[r,L-t.shape[1]:]=1
        with torch.no_grad(): g=m(input_ids=b,attention_mask=mask,position_ids=(mask.cumsum(-1)-1).clamp(min=0)).logits
        return [(g[r,-1]-m(input_ids=texts[r]).logits[0,-1]).abs().max().item() for r in range(2)]
    attempt("left pad logits", slidepad)
    def nopos():
        b=torch.cat([torch.full((1,5),PAD),tokens(4,seed=4)],1); mask=torch.tensor([[0]*5+[1]*4])
        with torch.no_grad(): g=m(input_ids=b,attention_mask=mask).logits
        return g.isfinite().all().item()
    attempt("nopos", nopos)
    attempt("static cache", lambda: torch.equal(greedy(m,ids,cache_implementation="static"), greedy(m,ids)))
    attempt("assisted/prompt lookup", lambda: torch.equal(greedy(m,ids,prompt_lookup_num_tokens=2), greedy(m,ids)))
    attempt("no mask", lambda: torch.equal(m.generate(ids,do_sample=False,max_new_tokens=NEW,min_new_tokens=NEW,pad_token_id=PAD)[:,9:], greedy(m,ids)))
    attempt("max_length", lambda: m.generate(ids,do_sample=False,max_length=12,pad_token_id=PAD,attention_mask=torch.ones_like(ids)).shape)
    attempt("attn eager", lambda: (AutoModelForCausalLM.from_pretrained(run_of(name)/"model", attn_implementation="eager")(ids).logits - AutoModelForCausalLM.from_pretrained(run_of(name)/"model")(ids).logits).abs().max().item())
    attempt("device_map", lambda: AutoModelForCausalLM.from_pretrained(run_of(name)/"model", device_map="cpu")(ids).logits.shape)
    attempt("meta", lambda: AutoModelForCausalLM.from_pretrained(run_of(name)/"model", device_map={"":"cpu"})(ids).logits.shape)
    import copy
    attempt("deepcopy", lambda: torch.equal(copy.deepcopy(m)(ids).logits, m(ids).logits))
    attempt("to bf16", lambda: copy.deepcopy(m).to(torch.bfloat16)(ids).logits.dtype)
    def after_half():
        c=m.to(torch.float32); a=c(ids).logits
        return a.dtype
    attempt("to f32", after_half)
