//! A model over HTTP, in the form of OpenAI's.
//!
//! It listens before the model is there, so that whoever waits for it can ask. When it is to stop it takes no more
//! requests, and those that run have a while to end.

mod access;
mod events;
mod metrics;
mod routes;

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{interval, sleep, timeout};

use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::openai::Api;
use crate::pool::lock;
use access::Access;
use metrics::Metrics;

/// Connections at once; more wait to be taken.
const MAX_CONNECTIONS: usize = 1024;
/// Bodies that are made ready at once, each by a thread.
const PREPARING: usize = 8;
/// The stack of such a thread; a schema nests as deep as JSON may.
const STACK: usize = 16 << 20;
/// How long a sender may take for the head of a request, and how long a connection may stay without one.
const HEAD_TIME: Duration = Duration::from_secs(30);
/// How long requests that run may take to end when the server is to stop.
const DRAIN_TIME: Duration = Duration::from_secs(30);
/// How often it is looked whether to stop.
const TICK: Duration = Duration::from_millis(50);

/// How a model is served.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Where to listen; a port of 0 is any that is free.
    pub listen: SocketAddr,
    /// What clients have to know. Without it, pages of other sites are kept out as far as a browser tells of them.
    pub key: Option<String>,
    /// Has the server end.
    pub stop: Cancel,
}

/// A server that runs in a thread of its own. It ends where it is dropped.
pub struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    api: OnceLock<Arc<Api>>,
    access: Access,
    metrics: Metrics,
    stop: Cancel,
    closing: AtomicBool,
    /// Once the engine has ended: what it failed with.
    end: Mutex<Option<Result<()>>>,
}

impl Server {
    /// Listens, and says to all who ask that the model is being loaded.
    ///
    /// # Errors
    /// The address is taken, or is none of this machine.
    pub fn start(options: &ServeOptions) -> Result<Self> {
        let failed = |e| Error::io("listen on", options.listen.to_string().as_ref(), e);
        let listener = TcpListener::bind(options.listen).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let shared = Arc::new(Shared {
            api: OnceLock::new(),
            access: Access::new(options.key.as_deref(), address),
            metrics: Metrics::default(),
            stop: options.stop.clone(),
            closing: AtomicBool::new(false),
            end: Mutex::new(None),
        });
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().max_blocking_threads(PREPARING).thread_stack_size(STACK).build();
        let runtime = runtime.map_err(Error::no_thread)?;
        let of_thread = Arc::clone(&shared);
        let run = move || {
            // Where it cannot be listened to there is nobody to be answered.
            let _ = runtime.block_on(run(listener, of_thread));
            // A template or a tokenizer that still runs is waited for by nobody.
            runtime.shutdown_background();
        };
        let thread = thread::Builder::new().name("evenkeel-http".to_owned()).spawn(run).map_err(Error::no_thread)?;
        Ok(Self { address, shared, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Has `api` answer from now on.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn open(&self, api: Api) -> Result<()> {
        let (engine, shared) = (api.engine().clone(), Arc::clone(&self.shared));
        let watch = move || {
            let end = engine.wait();
            *lock(&shared.end) = Some(end);
        };
        thread::Builder::new().name("evenkeel-end".to_owned()).spawn(watch).map_err(Error::no_thread)?;
        // The first one stays.
        let _ = self.shared.api.set(Arc::new(api));
        Ok(())
    }

    /// Waits until the server has ended: it was to stop, and those requests that ran have ended or had their time.
    ///
    /// # Errors
    /// The engine failed.
    pub fn wait(mut self) -> Result<()> {
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            return Err(Error::device("the server has ended by itself"));
        }
        lock(&self.shared.end).take().unwrap_or(Ok(()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }

    /// Whether no more is to be taken.
    fn is_to_end(&self) -> bool {
        self.is_closing() || self.stop.is_cancelled() || lock(&self.end).is_some()
    }
}

/// Takes connections until it is to end, and waits for those that are there.
async fn run(listener: TcpListener, shared: Arc<Shared>) -> std::io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let (closing, is_closing) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut tick = interval(TICK);
    while !shared.is_to_end() {
        tokio::select! {
            taken = listener.accept(), if connections.len() < MAX_CONNECTIONS => match taken {
                Ok((stream, _)) => { connections.spawn(serve(stream, Arc::clone(&shared), is_closing.clone())); }
                // Most of all, no more files can be opened.
                Err(_) => sleep(TICK).await,
            },
            Some(_) = connections.join_next() => {}
            _ = tick.tick() => {}
        }
    }
    drop(listener);
    shared.closing.store(true, Ordering::Relaxed);
    drop(closing);
    let all_over = async { while connections.join_next().await.is_some() {} };
    // Those that go on are broken off, which cancels their requests.
    let in_time = timeout(DRAIN_TIME, all_over).await.is_ok();
    if let Some(api) = shared.api.get() {
        api.engine().close();
        // It has nothing to do any more, but may have failed.
        while in_time && lock(&shared.end).is_none() {
            sleep(TICK).await;
        }
    }
    Ok(())
}

/// Answers what comes over a connection.
async fn serve(stream: TcpStream, shared: Arc<Shared>, mut closing: watch::Receiver<()>) {
    // Tokens are to be sent when they are there.
    let _ = stream.set_nodelay(true);
    let respond = |request| {
        let shared = Arc::clone(&shared);
        async move { Ok::<_, Infallible>(routes::respond(&shared, request).await) }
    };
    let mut connection = std::pin::pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIME)
            .serve_connection(TokioIo::new(stream), service_fn(respond))
    );
    // A client that breaks the connection has nobody to be told.
    tokio::select! {
        _ = connection.as_mut() => {}
        _ = closing.changed() => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
}
