//! Every duration of the operator, with its key in the file and its default. Tests run the same binary with short ones.

use std::time::Duration;

use crate::schedule::RetryTiming;

/// Every duration, once by its name here and once by its key in the file.
macro_rules! timing {
    ($($(#[$doc:meta])* $field:ident $key:literal = $default:expr;)*) => {
        /// Every duration that can be set.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct Timing {
            $($(#[$doc])* pub $field: Duration,)*
        }

        impl Default for Timing {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }

        impl Timing {
            pub(super) const KEYS: &[&str] = &[$($key),*];

            pub(super) fn by_key(&mut self, key: &str) -> Option<&mut Duration> {
                match key {
                    $($key => Some(&mut self.$field),)*
                    _ => None,
                }
            }
        }
    };
}

timing! {
    /// Every call to the Kubernetes API.
    api_timeout "apiTimeout" = Duration::from_secs(10);
    /// The first wait before the API server is asked again after it failed, for the CRD or for a watch; it doubles.
    api_backoff_first "apiBackoffFirst" = Duration::from_secs(1);
    /// The longest such wait.
    api_backoff_max "apiBackoffMax" = Duration::from_secs(15);
    /// A watch in which nothing comes for this long is begun again where it was, in whole seconds.
    watch_timeout "watchTimeout" = Duration::from_secs(20);
    /// How often a watch begins anew from a list, which heals what was missed.
    watch_relist "watchRelist" = Duration::from_mins(10);
    /// A leader that was not heard of for this long may be replaced.
    lease_duration "leaseDuration" = Duration::from_secs(15);
    /// How often the leader renews.
    lease_renew "leaseRenew" = Duration::from_secs(3);
    /// The PUT of one tag.
    tag_write_timeout "tagWriteTimeout" = Duration::from_secs(8);
    /// How much of the lease must be left when that begins.
    tag_write_margin "tagWriteMargin" = Duration::from_secs(9);
    /// The first wait after a failure that may pass; it doubles.
    retry_transient_min "retryTransientMin" = Duration::from_secs(30);
    /// The longest wait after such failures.
    retry_transient_max "retryTransientMax" = Duration::from_mins(15);
    /// The wait after a refused credential.
    retry_auth "retryAuth" = Duration::from_mins(15);
    /// How often a missing or wrong Secret is looked for.
    secret_retry "secretRetry" = Duration::from_secs(5);
    /// For how long that often; then the wait doubles.
    secret_retry_window "secretRetryWindow" = Duration::from_mins(2);
    /// The longest wait between looking for a Secret.
    secret_retry_max "secretRetryMax" = Duration::from_mins(5);
    /// How long a run goes on before its progress is written.
    progress_first "progressFirst" = Duration::from_secs(2);
    /// How often it is written then.
    progress_interval "progressInterval" = Duration::from_secs(10);
    /// How often it is looked at what is attached to images that have not changed.
    referrers_interval "referrersInterval" = Duration::from_hours(24);
    /// How long a tag is remembered that was restored from what others had written: three times, and it is left to them.
    restore_window "restoreWindow" = Duration::from_hours(24);
    /// A connection to a registry, with the look at its name and TLS.
    connect_timeout "connectTimeout" = Duration::from_secs(10);
    /// How long a connection to a registry is kept that nobody uses.
    pool_idle_timeout "poolIdleTimeout" = Duration::from_secs(20);
    /// The answer of a registry to a request without a body.
    head_timeout "headTimeout" = Duration::from_secs(30);
    /// A transfer in which no byte moves.
    idle_timeout "idleTimeout" = Duration::from_secs(30);
    /// How long a body is looked at before it is found to be too slow.
    floor_window "floorWindow" = Duration::from_mins(1);
    /// How long an upload under way is held for a source that wants to be left alone.
    hold_timeout "holdTimeout" = Duration::from_secs(15);
    /// The registry's answer after the last byte of an upload.
    answer_timeout "answerTimeout" = Duration::from_mins(10);
    /// Giving up an upload, so that the registry need not keep what arrived of it.
    cancel_timeout "cancelTimeout" = Duration::from_secs(5);
    /// The first wait before a failed request to a registry is repeated; it doubles.
    backoff_first "backoffFirst" = Duration::from_secs(1);
    /// The longest wait between repetitions.
    backoff_max "backoffMax" = Duration::from_secs(30);
    /// How long a registry is left alone after a first 429 that does not say for how long; it doubles.
    rate_pause "ratePause" = Duration::from_secs(10);
    /// How long a registry can be left alone, whatever it says.
    rate_pause_max "ratePauseMax" = Duration::from_hours(1);
    /// A registry that wants to be left alone for longer is not waited for inside a run: its images fail and are tried again.
    rate_wait_max "rateWaitMax" = Duration::from_mins(1);
    /// How often the files are read again that may change while the operator runs.
    config_poll "configPoll" = Duration::from_secs(30);
    /// How long runs have to end after SIGTERM.
    shutdown "shutdown" = Duration::from_secs(20);
}

impl Timing {
    /// The bounds between which failed images are tried again.
    #[must_use]
    pub fn retry(&self) -> RetryTiming {
        RetryTiming {
            transient_min: self.retry_transient_min,
            transient_max: self.retry_transient_max,
            authentication: self.retry_auth,
        }
    }
}
