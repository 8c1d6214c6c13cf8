//! Puts the operator together and takes it apart: probes first, then the CRD, then the lease, then the watch.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use futures::{StreamExt as _, stream};
use kube::{
    Api, Client, Config as KubeConfig, ResourceExt as _,
    api::ListParams,
    core::ObjectMeta,
    runtime::{
        Controller, Predicate as _, PredicateConfig, WatchStreamExt as _, controller, predicates,
        reflector::{self, ObjectRef},
    },
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::{
    context::Context,
    error::{call, is_not_found},
    events::Events,
    lease::{KeepEnd, Lease, LeaseOptions},
    reconcile::{Guarded, after_error, reconcile},
    review::Review,
    runner::Runner,
    secrets::awaited,
    watch::{Observer, changes},
};
use crate::{
    api::ImageMirror,
    config::{Authentication, Config, TlsFiles},
    copy::Fence,
    registry::{self, ClientOptions, Counters},
    telemetry::{
        follow::follow,
        metrics::Metrics,
        server::{Exposition, Gates, serve, serve_metrics},
        tls::{TlsError, server_config},
    },
};

/// What the operator is started with, beside its configuration.
pub struct Options {
    /// How the Kubernetes API is reached.
    pub kubernetes: KubeConfig,
    /// Where probes are served, and metrics without TLS.
    pub listen: SocketAddr,
    /// Where metrics are served with TLS, if the configuration says so.
    pub metrics_listen: SocketAddr,
    /// The namespace of the lease.
    pub lease_namespace: String,
    /// The name of the lease.
    pub lease_name: String,
    /// Who we are among the replicas.
    pub identity: String,
}

/// Why the operator did not start, or did not go on.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// The client for the Kubernetes API could not be set up.
    #[error("the client for the Kubernetes API could not be set up: {0}")]
    Client(#[from] kube::Error),
    /// An address could not be taken.
    #[error("cannot listen on {address}: {source}; choose another with {flag}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What names it.
        flag: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// The certificate for the metrics cannot be read.
    #[error("metrics.certFile or metrics.keyFile cannot be read: {0}")]
    CertificateRead(std::io::Error),
    /// The certificate for the metrics cannot be used.
    #[error("metrics.certFile and metrics.keyFile cannot be used: {0}")]
    Certificate(#[from] TlsError),
}

const GATE_CRD: &str = "crd";
const GATE_LEASE: &str = "lease";
const CRD_MISSING: &str = "the CustomResourceDefinition imagemirrors.imagemirror.dev to be installed";
/// Objects looked at side by side.
const CONCURRENT_RECONCILES: u16 = 16;

/// Runs the operator until `shutdown`. Returns when everything it started has ended.
pub async fn run(config: Config, mut options: Options, shutdown: CancellationToken) -> Result<(), OperatorError> {
    let config = Arc::new(config);
    // Reconciles are repeated by the controller: retries inside a call would only hide its deadline.
    options.kubernetes.default_retry = false;
    // Whoever holds a connection without a word is given up, a watch too: it is ended before by the API server.
    options.kubernetes.read_timeout = Some(config.timing.watch_timeout + config.timing.api_timeout);
    options.kubernetes.reset_reader_on_write = true;
    let client = Client::try_from(options.kubernetes.clone())?;
    let lease_client = Client::try_from(options.kubernetes)?;
    let counters = Arc::new(Counters::default());
    let (metrics, exposition) = Metrics::new(&counters);
    let metrics = Arc::new(metrics);
    let gates = Gates::new(&[GATE_CRD, GATE_LEASE]);
    let mut exposition = Exposition { registry: Arc::new(exposition), reviewer: None };
    if config.metrics.authentication == Authentication::TokenReview {
        exposition.reviewer = Some(Arc::new(Review::new(client.clone(), config.timing.api_timeout)));
    }
    let listener = bind(options.listen, "--listen").await?;
    let server_stop = CancellationToken::new();
    let mut servers = JoinSet::new();
    let open = match &config.metrics.tls {
        None => Some(exposition),
        Some(files) => {
            let listener = bind(options.metrics_listen, "--metrics-listen").await?;
            let secure = secure_metrics(listener, exposition, files, config.timing.config_poll, &server_stop)?;
            servers.spawn(secure);
            None
        }
    };
    servers.spawn(serve(listener, gates.clone(), open, server_stop.clone()));

    let lease_options = LeaseOptions {
        namespace: options.lease_namespace,
        name: options.lease_name,
        identity: options.identity.clone(),
        duration: config.timing.lease_duration,
        renew: config.timing.lease_renew,
        api_timeout: config.timing.api_timeout,
    };
    let (mut lease, held_until) = Lease::new(lease_client, lease_options, gates.clone());
    let registry = registry::Client::new(ClientOptions { counters: Some(counters), ..config.client_options() });
    // Waited for at the start, and again once a leader has lost both.
    while (gates.is_open(GATE_CRD) || wait_for_crd(&client, &config, &gates, &shutdown).await)
        && lease.acquire(&shutdown).await
    {
        metrics.set_leader(true);
        let fence = Fence::Held { until: held_until.clone(), margin: config.timing.tag_write_margin };
        let events = Events::new(client.clone(), options.identity.clone(), config.timing.api_timeout);
        let (wake, woken) = mpsc::channel::<ObjectRef<ImageMirror>>(1024);
        let runner = Runner::new(&config, registry.clone(), fence, wake, Arc::clone(&metrics));
        let context =
            Context::new(client.clone(), Arc::clone(&config), runner, events, Arc::clone(&metrics), gates.clone());
        let end = lead(Arc::new(context), woken, &mut lease, &shutdown).await;
        metrics.set_leader(false);
        metrics.forget_all();
        if end == KeepEnd::Shutdown {
            lease.release().await;
            break;
        }
    }
    server_stop.cancel();
    while servers.join_next().await.is_some() {}
    Ok(())
}

async fn bind(address: SocketAddr, flag: &'static str) -> Result<TcpListener, OperatorError> {
    TcpListener::bind(address).await.map_err(|source| OperatorError::Listen { address, flag, source })
}

/// Serves metrics with the certificate that is in the files, also when that changes.
fn secure_metrics(
    listener: TcpListener,
    exposition: Exposition,
    files: &TlsFiles,
    every: Duration,
    stop: &CancellationToken,
) -> Result<impl Future<Output = std::io::Result<()>> + use<>, OperatorError> {
    let read = |path: &PathBuf| std::fs::read(path).map_err(OperatorError::CertificateRead);
    let config = server_config(&read(&files.cert)?, &read(&files.key)?)?;
    let (newest, config) = watch::channel(config);
    let followed = follow([files.cert.clone(), files.key.clone()], every, move |[cert, key]| {
        match server_config(&cert, &key) {
            Ok(config) => {
                newest.send_replace(config);
            }
            // The two are replaced one after the other, where they are not mounted from a Secret.
            Err(error) => tracing::warn!(%error, "the certificate of the metrics stays as it was"),
        }
    });
    let served = serve_metrics(listener, exposition, config, stop.clone());
    Ok(async move {
        tokio::select! {
            result = served => result,
            never = followed => match never {},
        }
    })
}

/// Reconciles for as long as the lease is ours.
async fn lead(
    context: Arc<Context>,
    woken: mpsc::Receiver<ObjectRef<ImageMirror>>,
    lease: &mut Lease,
    shutdown: &CancellationToken,
) -> KeepEnd {
    let stop = CancellationToken::new();
    let mut controller = tokio::spawn(control(Arc::clone(&context), woken, stop.clone()));
    let timing = &context.config.timing;
    let end = tokio::select! {
        end = lease.keep(shutdown) => Some(end),
        _ = &mut controller => None,
    };
    // Nothing of ours may write a tag once the lease is lost: no run starts any more, and those that go on are cancelled.
    stop.cancel();
    let ended = async {
        if end.is_some() && tokio::time::timeout(timing.api_timeout, controller).await.is_err() {
            tracing::warn!("reconciles were still going on when the time for them was over");
        }
    };
    tokio::join!(ended, context.runner.stop(timing.shutdown));
    if let Some(end) = end {
        return end;
    }
    tracing::error!("the controller ended by a fault of ImageMirror: another begins, here or in a standby");
    let _ = shutdown.run_until_cancelled(tokio::time::sleep(timing.api_backoff_max)).await;
    KeepEnd::Lost
}

impl Observer for Context {
    fn shown(&self, object: &Guarded) {
        if let Ok(mirror) = &object.0 {
            self.runner.claims().shown(mirror);
        }
    }

    fn gone(&self, meta: &ObjectMeta) {
        let uid = meta.uid.as_deref().unwrap_or_default();
        self.runner.forget(uid);
        self.forget(uid, meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default());
    }

    fn complete(&self) {
        self.runner.claims().complete();
    }

    fn served(&self, is_served: bool) {
        if is_served {
            self.gates.open(GATE_CRD);
        } else {
            self.gates.close(GATE_CRD, CRD_MISSING);
        }
    }
}

async fn control(context: Arc<Context>, woken: mpsc::Receiver<ObjectRef<ImageMirror>>, stop: CancellationToken) {
    let (reader, writer) = reflector::store::<Guarded>();
    let observer: Arc<dyn Observer> = Arc::clone(&context) as Arc<dyn Observer>;
    let objects = changes(&context.client, &context.config.watch_namespaces, &context.config.timing, &observer)
        // Who wrote which field is a large part of a small object, and nothing that we look at.
        .modify(|object| object.managed_fields_mut().clear())
        .reflect(writer)
        .touched_objects()
        // Known by their uid: one deleted and created again with the same generation is looked at too.
        .predicate_filter(predicates::generation.combine(predicates::annotations), PredicateConfig::default());
    let awaited = awaited(Arc::clone(&context), reader.clone());
    let woken = ReceiverStream::new(woken).map(|object| {
        let guarded = ObjectRef::<Guarded>::new(&object.name);
        match object.namespace {
            Some(namespace) => guarded.within(&namespace),
            None => guarded,
        }
    });
    let config = controller::Config::default().concurrency(CONCURRENT_RECONCILES);
    Controller::for_stream(objects, reader)
        .with_config(config)
        .reconcile_on(stream::select(woken, awaited))
        .graceful_shutdown_on(async move { stop.cancelled().await })
        .run(reconcile, after_error, context)
        .for_each(|outcome| async move {
            match outcome {
                Err(controller::Error::QueueError(error)) => tracing::warn!(%error, "the watch of ImageMirrors failed"),
                // Reconciles have logged their own, and what is gone needs no word.
                Err(error) => tracing::debug!(%error, "the controller reported"),
                Ok(_) => {}
            }
        })
        .await;
}

/// Waits until the API server knows our kind. False if the shutdown came first.
async fn wait_for_crd(client: &Client, config: &Config, gates: &Gates, shutdown: &CancellationToken) -> bool {
    let api: Api<Guarded> = match config.watch_namespaces.first() {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    };
    let (mut wait, longest) = (config.timing.api_backoff_first, config.timing.api_backoff_max);
    loop {
        let one = ListParams::default().limit(1);
        let list = api.list(&one);
        let why = match call("listing ImageMirrors", config.timing.api_timeout, list).await {
            Ok(_) => {
                gates.open(GATE_CRD);
                return true;
            }
            Err(super::Error::Api { source, .. }) if is_not_found(&source) => CRD_MISSING.to_owned(),
            Err(error) => error.to_string(),
        };
        tracing::warn!(waiting_for = %why, "not ready yet");
        gates.close(GATE_CRD, &why);
        tokio::select! {
            () = shutdown.cancelled() => return false,
            () = tokio::time::sleep(wait) => wait = (wait * 2).min(longest),
        }
    }
}
