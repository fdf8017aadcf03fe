//! Counts and times as Prometheus reads them, under the names that vLLM has for them.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use crate::openai::Api;
use crate::pool::lock;

/// Seconds; what took longer is counted by the last bucket, which has no end.
const FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const WHOLE: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];

/// What the engine itself does not count.
pub struct Metrics(Mutex<Counts>);

struct Counts {
    first_token: Histogram,
    whole: Histogram,
    finished: BTreeMap<&'static str, u64>,
}

struct Histogram {
    bounds: &'static [f64],
    counts: Vec<u64>,
    count: u64,
    sum: f64,
}

impl Default for Metrics {
    fn default() -> Self {
        let finished = ["abort", "length", "stop"].map(|reason| (reason, 0)).into();
        let (first_token, whole) = (Histogram::new(FIRST_TOKEN), Histogram::new(WHOLE));
        Self(Mutex::new(Counts { first_token, whole, finished }))
    }
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len()], count: 0, sum: 0.0 }
    }

    fn observe(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        for (count, bound) in self.counts.iter_mut().zip(self.bounds) {
            *count += u64::from(seconds <= *bound);
        }
        self.count += 1;
        self.sum += seconds;
    }
}

impl Metrics {
    pub fn first_token(&self, time: Duration) {
        lock(&self.0).first_token.observe(time);
    }

    /// A request has ended, with a reason for each choice.
    pub fn finished(&self, time: Duration, reasons: impl Iterator<Item = &'static str>) {
        let mut counts = lock(&self.0);
        counts.whole.observe(time);
        for reason in reasons {
            *counts.finished.entry(reason).or_default() += 1;
        }
    }

    /// A request has ended without an answer.
    pub fn broken_off(&self) {
        *lock(&self.0).finished.entry("abort").or_default() += 1;
    }

    /// All that is known, as text.
    pub fn text(&self, api: &Api) -> String {
        let (engine, state) = (api.engine(), api.engine().state());
        let model = format!("model_name=\"{}\"", escape(api.name()));
        let mut text = String::new();
        let share = state.pages_used as f64 / state.pages.max(1) as f64;
        for (name, kind, about, value) in [
            ("num_requests_running", "gauge", "Requests that are computed.", state.running as f64),
            ("num_requests_waiting", "gauge", "Requests that wait for room.", state.waiting as f64),
            ("kv_cache_usage_perc", "gauge", "The share of the KV cache that requests have; 1 is all.", share),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", state.prompt_tokens as f64),
            ("generation_tokens_total", "counter", "Tokens that were generated.", state.generated_tokens as f64),
            ("num_preemptions_total", "counter", "Requests that gave their room back.", state.preemptions as f64),
            ("prefix_cache_queries_total", "counter", "Tokens looked for in the cache.", state.prompt_tokens as f64),
            ("prefix_cache_hits_total", "counter", "Tokens found in the cache.", state.kept_tokens as f64),
        ] {
            text += &head(&format!("vllm:{name}"), kind, about);
            text += &format!("vllm:{name}{{{model}}} {value}\n");
        }
        let counts = lock(&self.0);
        for (name, about, histogram) in [
            ("time_to_first_token_seconds", "Time to the first token.", &counts.first_token),
            ("e2e_request_latency_seconds", "Time to the last token.", &counts.whole),
        ] {
            text += &head(&format!("vllm:{name}"), "histogram", about);
            let Histogram { bounds, counts, count, sum } = histogram;
            for (bound, count) in bounds.iter().zip(counts) {
                text += &format!("vllm:{name}_bucket{{{model},le=\"{bound:?}\"}} {count}\n");
            }
            text += &format!("vllm:{name}_bucket{{{model},le=\"+Inf\"}} {count}\n");
            text += &format!("vllm:{name}_sum{{{model}}} {sum}\nvllm:{name}_count{{{model}}} {count}\n");
        }
        text += &head("vllm:request_success_total", "counter", "Answers, by why they ended.");
        for (reason, count) in &counts.finished {
            text += &format!("vllm:request_success_total{{{model},finished_reason=\"{reason}\"}} {count}\n");
        }
        text += &head("evenkeel_device_planned_bytes", "gauge", "What the plan takes of a device.");
        let mut planned = BTreeMap::new();
        for allocation in &engine.plan().allocations {
            *planned.entry((allocation.device, allocation.purpose)).or_insert(0) += allocation.bytes.0;
        }
        for ((device, purpose), bytes) in planned {
            let labels = format!("device=\"{device}\",purpose=\"{purpose}\"");
            text += &format!("evenkeel_device_planned_bytes{{{labels}}} {bytes}\n");
        }
        text += &head("evenkeel_device_measured_bytes", "gauge", "What the load took of a device.");
        for device in &engine.report().devices {
            text += &format!("evenkeel_device_measured_bytes{{device=\"{}\"}} {}\n", device.id, device.measured.0);
        }
        text
    }
}

fn head(name: &str, kind: &str, about: &str) -> String {
    format!("# HELP {name} {about}\n# TYPE {name} {kind}\n")
}

fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
