//! Who answers what.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Either, Full, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{
    ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER,
    WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use hyper::{Method, Request, Response, StatusCode};
use serde_json::{Value, json};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::Shared;
use super::events::{Listening, Stream};
use crate::openai::{Api, Failure, Form};

/// The longest body.
const MAX_BODY: usize = 8 << 20;
/// How long a sender may take for it.
const BODY_TIME: Duration = Duration::from_secs(30);
/// Seconds after which a client may try again.
const PAUSE: &str = "1";
const PAGE: &str = include_str!("page.html");
/// Of the page, which has its script and its style in it.
const PAGE_POLICY: &str =
    "default-src 'self' 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

type Answer = Response<Either<Full<Bytes>, Stream>>;

/// What is asked of a path.
enum Route {
    Page,
    Health,
    Metrics,
    Plan,
    Models,
    Model(String),
    Call(Form),
}

impl Route {
    fn of(path: &str) -> Option<Self> {
        Some(match path {
            "/" => Self::Page,
            "/health" => Self::Health,
            "/metrics" => Self::Metrics,
            "/plan" => Self::Plan,
            "/v1/models" => Self::Models,
            "/v1/chat/completions" => Self::Call(Form::Chat),
            "/v1/completions" => Self::Call(Form::Text),
            _ => Self::Model(path.strip_prefix("/v1/models/")?.to_owned()),
        })
    }

    fn method(&self) -> Method {
        if matches!(self, Self::Call(_)) { Method::POST } else { Method::GET }
    }
}

/// The answer to a request, whatever it is.
pub async fn respond(shared: &Arc<Shared>, request: Request<Incoming>) -> Answer {
    let answered = match shared.access.check(&request) {
        Ok(()) => route(shared, request).await,
        Err(failure) => Err(failure),
    };
    let mut answer = answered.unwrap_or_else(|failure| refused(&failure));
    set(&mut answer, X_CONTENT_TYPE_OPTIONS, "nosniff");
    answer
}

async fn route(shared: &Arc<Shared>, request: Request<Incoming>) -> Result<Answer, Failure> {
    let path = request.uri().path();
    let route = Route::of(path).ok_or_else(|| Failure::new(404, format!("there is nothing at `{path}`")))?;
    let method = request.method();
    if *method != route.method() && !(*method == Method::HEAD && route.method() == Method::GET) {
        let mut answer = refused(&Failure::new(405, format!("`{path}` does not take {method}")));
        set(&mut answer, ALLOW, if route.method() == Method::POST { "POST" } else { "GET, HEAD" });
        return Ok(answer);
    }
    Ok(match route {
        Route::Page => {
            let mut page = whole(200, "text/html; charset=utf-8", PAGE);
            set(&mut page, CONTENT_SECURITY_POLICY, PAGE_POLICY);
            page
        }
        Route::Health => health(shared),
        Route::Metrics => {
            let text = shared.metrics.text(ready(shared)?);
            whole(200, "text/plain; version=0.0.4; charset=utf-8", text)
        }
        Route::Plan => json(200, &plan(ready(shared)?)),
        Route::Models => json(200, &json!({"object": "list", "data": [ready(shared)?.model()]})),
        Route::Model(name) => {
            let api = ready(shared)?;
            if name != api.name() {
                return Err(Failure::new(404, format!("there is no model `{name}`")));
            }
            json(200, &api.model())
        }
        Route::Call(form) => call(shared, form, request).await?,
    })
}

async fn call(shared: &Arc<Shared>, form: Form, request: Request<Incoming>) -> Result<Answer, Failure> {
    let start = Instant::now();
    let api = Arc::clone(ready(shared)?);
    let body = body(request).await?;
    let prepare = {
        let api = Arc::clone(&api);
        move || api.call(form, &body)
    };
    let call = spawn_blocking(prepare).await.map_err(|_| Failure::new(500, "the request cannot be made ready"))?;
    let call = call.map_err(|error| Failure::from(&error))?;
    let is_stream = call.stream;
    let listening = Listening::new(call, &api, shared, start).map_err(|error| Failure::from(&error))?;
    if is_stream {
        let mut answer = Response::new(Either::Right(Stream::new(listening)));
        set(&mut answer, CONTENT_TYPE, "text/event-stream");
        set(&mut answer, CACHE_CONTROL, "no-cache");
        return Ok(answer);
    }
    let answer = listening.whole().await.map_err(|error| Failure::from(&error))?;
    Ok(json(200, &answer))
}

/// The model, if it is loaded and takes requests.
fn ready(shared: &Shared) -> Result<&Arc<Api>, Failure> {
    if shared.is_closing() {
        return Err(Failure::new(503, "the server is closing"));
    }
    shared.api.get().ok_or_else(|| Failure::new(503, "the model is being loaded"))
}

fn health(shared: &Shared) -> Answer {
    let (status, word) = match (shared.is_closing(), shared.api.get()) {
        (true, _) => (503, "closing"),
        (_, None) => (503, "loading"),
        _ => (200, "ok"),
    };
    json(status, &json!({"status": word}))
}

/// The plan as a picture, and what is in use of it.
fn plan(api: &Api) -> Value {
    let (engine, plan) = (api.engine(), api.engine().plan());
    let state = engine.state();
    let measured = engine
        .report()
        .devices
        .iter()
        .map(|device| json!({"id": device.id, "planned": device.planned, "measured": device.measured}));
    json!({
        "model": api.name(),
        "context": plan.context,
        "sequences": plan.batch,
        "picture": plan.to_svg(),
        "devices": measured.collect::<Vec<_>>(),
        "running": state.running,
        "waiting": state.waiting,
        "pages": state.pages,
        "pages_used": state.pages_used,
        "pages_kept": state.pages_kept,
        "prompt_tokens": state.prompt_tokens,
        "generated_tokens": state.generated_tokens,
    })
}

async fn body(request: Request<Incoming>) -> Result<Bytes, Failure> {
    let too_large = || Failure::new(413, format!("the body is longer than {MAX_BODY} bytes"));
    if request.body().size_hint().lower() > MAX_BODY as u64 {
        return Err(too_large());
    }
    let all = Limited::new(request.into_body(), MAX_BODY).collect();
    match timeout(BODY_TIME, all).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => Err(Failure::new(400, format!("the body does not arrive: {error}"))),
        Err(_) => Err(Failure::new(408, format!("the body took longer than {} s", BODY_TIME.as_secs()))),
    }
}

fn refused(failure: &Failure) -> Answer {
    let mut answer = json(failure.status, &failure.to_json());
    match failure.status {
        401 => set(&mut answer, WWW_AUTHENTICATE, "Bearer"),
        429 | 503 => set(&mut answer, RETRY_AFTER, PAUSE),
        _ => {}
    }
    answer
}

fn json(status: u16, value: &Value) -> Answer {
    whole(status, "application/json", value.to_string())
}

fn whole(status: u16, kind: &'static str, text: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Either::Left(Full::new(text.into())));
    *answer.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    set(&mut answer, CONTENT_TYPE, kind);
    answer
}

fn set(answer: &mut Answer, name: HeaderName, value: &'static str) {
    answer.headers_mut().insert(name, HeaderValue::from_static(value));
}
