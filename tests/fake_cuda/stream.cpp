// Streams and events. By default ("eager") every operation runs inside the call that submits it;
// with FAKE_CUDA_STREAMS=lazy operations wait in their stream's queue until something forces them,
// which is the most hostile schedule a real GPU could choose.
#include "driver.h"

namespace fk {

// Runs one operation. Its failure is asynchronous on a real GPU, so it becomes the context's sticky
// error, which the *next* call reports.
static void exec(Stream* s, Op& op) {
    Context* c = s->ctx;
    std::lock_guard<std::recursive_mutex> l(g_cfg.lazy ? g_lazy_mu : c->dev->exec);
    if (c->sticky) return;
    c->dev->previous_launch = s->last_launch, c->dev->this_launch = 0;
    if (CUresult r = op.run()) c->sticky = r;
    if (!op.event) s->last_launch = op.launch ? c->dev->this_launch : 0;
}
static bool step(Stream* s) {
    std::lock_guard<std::recursive_mutex> l(g_lazy_mu);
    if (s->queue.empty()) return false;
    Op op = std::move(s->queue.front());
    s->queue.pop_front();
    exec(s, op);
    return true;
}
void drain(Stream* s) { if (g_cfg.lazy) while (step(s)) {} }
void drain_ctx(Context* c) {
    if (!g_cfg.lazy) return;
    std::lock_guard<std::recursive_mutex> l(g_lazy_mu);
    drain(&c->null_stream);
    for (Stream* s : std::set<Stream*>(c->streams)) drain(s);
}
CUresult submit(Stream* s, Op op) {
    if (s->capture) return s->capture->ops.push_back(std::move(op)), CUDA_SUCCESS;
    if (!g_cfg.lazy) return exec(s, op), CUDA_SUCCESS;
    std::lock_guard<std::recursive_mutex> l(g_lazy_mu);
    s->queue.push_back(std::move(op));
    return CUDA_SUCCESS;
}
Stream* resolve(void* h) {
    if (!h) { Context* c = current(); return c ? &c->null_stream : nullptr; }
    return g_streams.has((Stream*)h) ? (Stream*)h : nullptr;
}

}  // namespace fk

using namespace fk;

API cuStreamCreate(Stream** out, unsigned flags) {
    NEED_CTX(c);
    NEED(flags == 1);  // blocking streams, which wait for the null stream, are not emulated
    Stream* s = new Stream;
    s->ctx = c;
    { std::lock_guard<std::recursive_mutex> l(g_lazy_mu); c->streams.insert(s); }
    *out = g_streams.add(s);
    return CUDA_SUCCESS;
}
API cuStreamDestroy_v2(Stream* s) {
    NEED_INIT();
    if (!g_streams.remove(s)) return CUDA_ERROR_INVALID_HANDLE;
    drain(s);
    std::lock_guard<std::recursive_mutex> l(g_lazy_mu);
    s->ctx->streams.erase(s);  // the object is leaked: events may still name it
    return CUDA_SUCCESS;
}
API cuStreamSynchronize(void* hs) {
    NEED_CTX(c);
    Stream* s = resolve(hs);
    if (!s) return CUDA_ERROR_INVALID_HANDLE;
    if (s->capture) return s->broken = true, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    drain(s);
    return s->ctx->sticky;
}

// ---- graphs: what a stream was given while it was captured, in that order ------------------------
API cuStreamBeginCapture_v2(Stream* s, unsigned) {
    NEED_CTX(c);
    if (!g_streams.has(s)) return CUDA_ERROR_INVALID_HANDLE;
    if (!g_cfg.graphs) return CUDA_ERROR_NOT_SUPPORTED;
    NEED(!s->capture);
    s->capture = std::make_unique<Graph>();
    s->broken = false;
    return CUDA_SUCCESS;
}
API cuStreamEndCapture(Stream* s, Graph** out) {
    NEED_CTX(c);
    if (!g_streams.has(s)) return CUDA_ERROR_INVALID_HANDLE;
    NEED(s->capture);
    auto graph = std::move(s->capture);
    *out = nullptr;
    if (s->broken) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    *out = g_graphs.add(graph.release());
    return CUDA_SUCCESS;
}
API cuGraphInstantiateWithFlags(Graph** out, Graph* graph, unsigned long long) {
    NEED_CTX(c);
    if (!g_graphs.has(graph)) return CUDA_ERROR_INVALID_HANDLE;
    if (g_fail_instantiate.hit()) return g_fail_instantiate.code;
    auto executable = std::make_unique<Graph>(*graph);
    if (CUresult r = charge(c, g_cfg.graph_bytes)) return r;
    executable->ctx = c, executable->charged = g_cfg.graph_bytes;
    *out = g_graphs.add(executable.release());
    return CUDA_SUCCESS;
}
API cuGraphUpload(Graph* graph, void* hs) {
    NEED_CTX(c);
    if (!resolve(hs) || !g_graphs.has(graph)) return CUDA_ERROR_INVALID_HANDLE;
    return g_fail_upload.hit() ? g_fail_upload.code.load() : CUDA_SUCCESS;
}
API cuGraphLaunch(Graph* graph, void* hs) {
    NEED_CTX(c);
    Stream* s = resolve(hs);
    if (!s || !g_graphs.has(graph)) return CUDA_ERROR_INVALID_HANDLE;
    if (g_fail_graph_launch.hit()) return g_fail_graph_launch.code;
    for (const Op& op : graph->ops)
        if (CUresult r = submit(s, op)) return r;
    c->dev->stats.graph_launches++;
    return CUDA_SUCCESS;
}
API cuGraphDestroy(Graph* graph) {
    NEED_INIT();
    if (!g_graphs.remove(graph)) return CUDA_ERROR_INVALID_HANDLE;
    if (graph->charged) uncharge(graph->ctx, graph->charged);
    delete graph;
    return CUDA_SUCCESS;
}
API cuGraphExecDestroy(Graph* graph) { return cuGraphDestroy(graph); }

static std::mutex& g_event_mu = *new std::mutex;
static void wait_for(const Recording& r) { while (!r.done && step(r.stream)) {} }
API cuEventCreate(Event** out, unsigned) { NEED_CTX(c); *out = g_events.add(new Event{c, nullptr}); return CUDA_SUCCESS; }
API cuEventDestroy_v2(Event* e) { NEED_INIT(); if (!g_events.remove(e)) return CUDA_ERROR_INVALID_HANDLE; delete e; return CUDA_SUCCESS; }
API cuEventRecord(Event* e, void* hs) {
    NEED_CTX(c);
    Stream* s = resolve(hs);
    if (!s || !g_events.has(e) || e->ctx != s->ctx) return CUDA_ERROR_INVALID_HANDLE;
    auto rec = std::make_shared<Recording>(Recording{s});
    { std::lock_guard<std::mutex> l(g_event_mu); e->rec = rec; }
    return submit(s, {[rec] { rec->done = true; return CUDA_SUCCESS; }, false, true});
}
API cuStreamWaitEvent(void* hs, Event* e, unsigned) {
    NEED_CTX(c);
    Stream* s = resolve(hs);
    if (!s || !g_events.has(e)) return CUDA_ERROR_INVALID_HANDLE;
    std::shared_ptr<Recording> rec;
    { std::lock_guard<std::mutex> l(g_event_mu); rec = e->rec; }
    if (!g_cfg.lazy) s->last_launch = 0;
    if (!rec || !g_cfg.lazy) return CUDA_SUCCESS;
    return submit(s, {[rec] { wait_for(*rec); return CUDA_SUCCESS; }});
}
API cuEventSynchronize(Event* e) {
    NEED_INIT();
    if (!g_events.has(e)) return CUDA_ERROR_INVALID_HANDLE;
    std::shared_ptr<Recording> rec;
    { std::lock_guard<std::mutex> l(g_event_mu); rec = e->rec; }
    if (e->ctx->sticky) return e->ctx->sticky;
    if (rec) wait_for(*rec);
    return e->ctx->sticky;
}
