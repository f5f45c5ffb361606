from tests.ranks.harness import run_ranks
from copus_ext.core.plan import Layout, Plan, parse_plan
import sys
def main(flags, plans):
    import time, torch, gc; torch.compiler.set_stance("force_eager")
    from tests.ranks.tiny import raw_arguments, start_upstream
    from tests.ranks.steps import build, train_steps
    from copus_ext.adapters.reshard import reshard, carry_scheduler, PlanCache
    from copus_ext.adapters.job_state import job_state
    raw=raw_arguments(flags)
    args, layouts, groups = start_upstream(raw, plans[0])
    out=[]; gc.freeze()
    cache=PlanCache()
    times={}
    def clock(n,f):
        t=time.perf_counter(); r=f(); times[n]=round(times.get(n,0)+time.perf_counter()-t,3); return r
    for a in plans:
      for b in plans:
        if a is b: continue
        job=clock('build',lambda:build(layouts, raw, a))
        l1=clock('steps',lambda:train_steps(job, layouts, 2))
        new=clock('build',lambda:build(layouts, raw, b, initialise_weights=False))
        r=clock('reshard',lambda:reshard(job,new,plans=cache)); carry_scheduler(job,new)
        back=clock('build',lambda:build(layouts, raw, a, initialise_weights=False))
        r2=clock('reshard',lambda:reshard(new,back,plans=cache)); carry_scheduler(new,back)
        A=job_state(job,with_moments=True); B=job_state(back,with_moments=True)
        same=all(torch.equal(x,y) for p,q in zip(A.pieces,B.pieces) for x,y in zip(p.tensors,q.tensors))
        same2=all(torch.equal(x,y) for c,d in zip(job.model,back.model) for x,y in zip(c.parameters(),d.parameters()))
        l2=clock('steps',lambda:train_steps(new, layouts, 1, first_sample=2*a.global_batch))
        l3=clock('steps',lambda:train_steps(job, layouts, 1, first_sample=2*a.global_batch))
        out.append((str(a),str(b),r.bytes_moved==r.bytes_minimum,r.bytes_moved,r2.bytes_moved,r2.bytes_moved==r2.bytes_minimum, r.exact,r2.exact,same,same2,l1,l2,l3))
        for j in (job,new,back): j.release()
        A=B=job=new=back=j=None

    return out,times
if __name__=="__main__":
    base=Plan(Layout(dp=4),1,8)
    plans=[parse_plan(x,base) for x in sys.argv[1].split(";")]
    res=run_ranks(4, main, " ".join(sys.argv[2:]), plans)
    for x in res[0][0]: print(*x)
    print([ all(all(a[-5-2:-3]) for a in r[0]) for r in res], res[0][1])
