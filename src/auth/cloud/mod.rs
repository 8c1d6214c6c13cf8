//! The registries of the clouds: which host is whose, and how an identity of a cloud is exchanged for a login.

mod acr;
#[cfg(feature = "aws")]
mod aws;
mod azure;
#[cfg(feature = "azure")]
mod entra;
mod gcp;

use std::{collections::BTreeMap, fmt, sync::Arc};

pub use acr::AcrToken;
pub use gcp::{GcpTrust, GcpTrustError};

use super::{Credential, Identity, Unusable};
use crate::{oci::Host, reason::Reason};

/// A cloud with logins of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cloud {
    /// Amazon Elastic Container Registry, private or public.
    Aws,
    /// Azure Container Registry.
    Azure,
    /// Google Artifact Registry and Container Registry.
    Gcp,
}

impl Cloud {
    /// The cloud that a registry belongs to, by its host's own pattern. A host with a port belongs to none.
    #[must_use]
    pub fn of(host: &Host) -> Option<Self> {
        let name = host.as_str();
        let is_azure = || name.split_once('.').is_some_and(|(_, rest)| AZURE.contains(&rest));
        let is_gcp = || name == "gcr.io" || name.ends_with(".gcr.io") || name.ends_with("-docker.pkg.dev");
        match () {
            () if EcrHost::of(host).is_some() => Some(Self::Aws),
            () if is_azure() => Some(Self::Azure),
            () if is_gcp() => Some(Self::Gcp),
            () => None,
        }
    }
}

impl fmt::Display for Cloud {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Aws => "aws",
            Self::Azure => "azure",
            Self::Gcp => "gcp",
        })
    }
}

/// Whose identity logs in.
#[derive(Clone, Debug)]
pub enum Principal {
    /// That of this program, as its surroundings say.
    Program,
    /// That of a `ServiceAccount`.
    Account(Account),
}

/// A `ServiceAccount` as clouds see it.
#[derive(Clone, Debug)]
pub struct Account {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// What its annotations say of who it is at which cloud.
    pub annotations: BTreeMap<String, String>,
    /// By what Google knows the cluster, where its annotations do not say it.
    pub gcp_trust: Option<GcpTrust>,
    /// Tokens that say that somebody is it.
    pub identity: Arc<dyn Identity>,
}

impl Principal {
    /// Who it is, for messages.
    fn origin(&self) -> String {
        match self {
            Self::Program => "this program's own identity".to_owned(),
            Self::Account(account) => format!("ServiceAccount {:?}", account.name),
        }
    }
}

impl Account {
    /// What it is called in its tokens, and so where a cloud is told to trust it.
    fn subject(&self) -> String {
        format!("system:serviceaccount:{}:{}", self.namespace, self.name)
    }

    /// An annotation that it must have.
    fn annotation(&self, key: &str) -> Result<&str, Unusable> {
        let value = self.annotations.get(key).filter(|value| !value.is_empty());
        value.map(String::as_str).ok_or_else(|| Unusable {
            reason: Reason::SecretInvalid,
            message: format!("ServiceAccount {:?} lacks the annotation {key}; add it", self.name),
        })
    }
}

/// How somebody logs in to a registry of a cloud with an identity there.
pub fn login(cloud: Cloud, host: &Host, principal: &Principal) -> Result<Credential, Unusable> {
    match cloud {
        #[cfg(feature = "aws")]
        Cloud::Aws => aws::login(host, principal),
        #[cfg(not(feature = "aws"))]
        Cloud::Aws => Err(not_built(cloud)),
        Cloud::Azure => azure::login(host, principal),
        Cloud::Gcp => gcp::login(principal),
    }
}

#[cfg(not(all(feature = "aws", feature = "azure", feature = "gcp")))]
fn not_built(cloud: Cloud) -> Unusable {
    Unusable {
        reason: Reason::InternalError,
        message: format!("this program was built without {cloud}; use a build that has it, or a Secret"),
    }
}

/// A written login as the host's cloud wants it: some are to be exchanged.
///
/// At Amazon's registries that is an access key, at Azure's a token without a user name.
#[must_use]
pub fn as_the_host_wants_it(host: &Host, written: &Arc<Credential>) -> Arc<Credential> {
    let is_plain = written.exchange().is_none() && written.as_identity_token().is_none();
    match Cloud::of(host) {
        #[cfg(feature = "aws")]
        Some(Cloud::Aws) if is_plain && aws::is_access_key(written.username()) => aws::key_pair(host, written),
        Some(Cloud::Azure) if is_plain && written.username().is_empty() => {
            let exchange = AcrToken::new(host.clone(), written.password().clone(), written.origin());
            Arc::new(written.exchanged_by(Arc::new(exchange)))
        }
        _ => Arc::clone(written),
    }
}

/// The suffixes of Azure's registries, by its clouds (learn.microsoft.com, "Azure Container Registry endpoints").
const AZURE: [&str; 3] = ["azurecr.io", "azurecr.cn", "azurecr.us"];

/// A registry of Amazon's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EcrHost {
    /// `<account>.dkr.ecr[-fips].<region>.amazonaws.com[.cn]`, or `<account>.dkr-ecr[-fips].<region>.on.aws`.
    Private {
        /// Twelve digits.
        account: String,
        /// Such as `eu-west-1`.
        region: String,
        /// Whether it is an endpoint with validated cryptography.
        fips: bool,
    },
    /// `public.ecr.aws`.
    Public,
}

impl EcrHost {
    /// Reads the host (docs.aws.amazon.com, "Amazon ECR endpoints and quotas").
    #[must_use]
    pub fn of(host: &Host) -> Option<Self> {
        let name = host.as_str();
        if name == "public.ecr.aws" || name == "ecr-public.aws.com" {
            return Some(Self::Public);
        }
        let (account, rest) = name.split_once(".dkr.ecr").or_else(|| name.split_once(".dkr-ecr"))?;
        let (fips, rest) = rest.strip_prefix("-fips").map_or((false, rest), |rest| (true, rest));
        let (region, suffix) = rest.strip_prefix('.')?.split_once('.')?;
        let is_account = account.len() == 12 && account.bytes().all(|byte| byte.is_ascii_digit());
        let is_ours = match region.split('-').next() {
            Some("cn") => suffix == "amazonaws.com.cn",
            Some("eusc") => suffix == "amazonaws.eu",
            _ => ["amazonaws.com", "on.aws"].contains(&suffix),
        };
        (is_account && is_region(region) && is_ours).then(|| Self::Private {
            account: account.to_owned(),
            region: region.to_owned(),
            fips,
        })
    }
}

/// Such as `eu-west-1`, `us-gov-west-1` or `eusc-de-east-1`. It becomes a part of the hosts that are shown a login, of which
/// others have names alike: `s3-us-west-2` is one.
fn is_region(text: &str) -> bool {
    let parts: Vec<&str> = text.split('-').collect();
    let [area, middle @ .., number] = parts.as_slice() else { return false };
    let is_word = |part: &&str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_lowercase());
    (area.len() == 2 || *area == "eusc")
        && is_word(area)
        && (1..=2).contains(&middle.len())
        && middle.iter().all(is_word)
        && (1..=2).contains(&number.len())
        && number.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use futures::future::BoxFuture;
    use secrecy::SecretString;

    use super::*;
    use crate::auth::ExchangeError;

    #[test]
    fn clouds_are_known_by_their_own_patterns_and_nothing_that_looks_like_them() {
        for (host, expected) in [
            ("123456789012.dkr.ecr.eu-west-1.amazonaws.com", Some(Cloud::Aws)),
            ("123456789012.dkr.ecr-fips.us-gov-west-1.amazonaws.com", Some(Cloud::Aws)),
            ("123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn", Some(Cloud::Aws)),
            ("123456789012.dkr-ecr.us-east-1.on.aws", Some(Cloud::Aws)),
            ("public.ecr.aws", Some(Cloud::Aws)),
            ("myregistry.azurecr.io", Some(Cloud::Azure)),
            ("myregistry.azurecr.cn", Some(Cloud::Azure)),
            ("gcr.io", Some(Cloud::Gcp)),
            ("eu.gcr.io", Some(Cloud::Gcp)),
            ("europe-west1-docker.pkg.dev", Some(Cloud::Gcp)),
            ("12345678901.dkr.ecr.eu-west-1.amazonaws.com", None),
            ("123456789012.dkr.ecr.eu-west-1.amazonaws.com.evil.example", None),
            ("123456789012.dkr.ecr.eu-west-1.amazonaws.com:5000", None),
            ("evil.example.123456789012.dkr.ecr.eu-west-1.amazonaws.com", None),
            ("123456789012.dkr.ecr.evil.example.amazonaws.com", None),
            ("123456789012.dkr.ecr.eusc-de-east-1.amazonaws.eu", Some(Cloud::Aws)),
            ("123456789012.dkr.ecr.us-isob-east-1.amazonaws.com", Some(Cloud::Aws)),
            ("123456789012.dkr.ecr.s3-us-west-2.amazonaws.com", None),
            ("123456789012.dkr.ecr.s3-accelerate.amazonaws.com", None),
            ("123456789012.dkr.ecr.fips-us-east-1.amazonaws.com", None),
            ("123456789012.dkr.ecr.us-east-1.amazonaws.com.cn", None),
            ("123456789012.dkr.ecr.cn-north-1.amazonaws.com", None),
            ("123456789012.dkr.ecr.us--east-1.amazonaws.com", None),
            ("azurecr.io", None),
            ("a.b.azurecr.io", None),
            ("myregistry.azurecr.io.evil.example", None),
            ("notgcr.io", None),
            ("pkg.dev", None),
            ("europe-west1-python.pkg.dev", None),
            ("docker.io", None),
        ] {
            assert_eq!(Cloud::of(&host.parse().unwrap()), expected, "{host}");
        }
    }

    #[derive(Debug)]
    struct Nobody;

    impl Identity for Nobody {
        fn token<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<SecretString, ExchangeError>> {
            unreachable!()
        }
    }

    /// What tokens and connections are kept by.
    #[test]
    fn no_two_identities_are_the_same_and_none_is_a_password() {
        let mut logins = Vec::new();
        let program = Principal::Program;
        let ecr = "123456789012.dkr.ecr.eu-west-1.amazonaws.com";
        for (cloud, host) in [(Cloud::Aws, ecr), (Cloud::Azure, "myregistry.azurecr.io"), (Cloud::Gcp, "gcr.io")] {
            let mut principals = vec![program.clone()];
            for (namespace, name) in [("a", "b"), ("a", "c"), ("b", "b")] {
                for value in ["one", "two", "one\" \"two"] {
                    let annotations = [
                        ("eks.amazonaws.com/role-arn", "role".to_owned()),
                        ("eks.amazonaws.com/audience", value.to_owned()),
                        ("azure.workload.identity/client-id", value.to_owned()),
                        ("azure.workload.identity/tenant-id", "t".to_owned()),
                        ("iam.gke.io/gcp-service-account", format!("{}@p", value.replace(['"', ' '], "-"))),
                    ];
                    principals.push(Principal::Account(Account {
                        namespace: namespace.to_owned(),
                        name: name.to_owned(),
                        annotations: annotations.map(|(key, value)| (key.to_owned(), value)).into(),
                        gcp_trust: Some("projects/p/locations/l/clusters/c".parse().unwrap()),
                        identity: Arc::new(Nobody),
                    }));
                }
            }
            logins
                .extend(principals.iter().filter_map(|principal| login(cloud, &host.parse().unwrap(), principal).ok()));
        }
        let passwords: Vec<_> = logins
            .iter()
            .map(|login| Credential::new(login.username().to_owned(), SecretString::default(), "Secret \"forged\""))
            .collect();
        let all: BTreeSet<_> = logins.iter().chain(&passwords).map(|login| login.fingerprint().to_string()).collect();
        assert_eq!(all.len(), 2 * logins.len());
        assert!(
            cfg!(not(all(feature = "aws", feature = "azure", feature = "gcp"))) || logins.len() == 30,
            "{logins:?}"
        );
    }

    #[test]
    fn the_host_of_an_ecr_says_account_and_region() {
        let host = "123456789012.dkr.ecr-fips.us-east-2.amazonaws.com".parse().unwrap();
        let private = EcrHost::Private { account: "123456789012".into(), region: "us-east-2".into(), fips: true };
        assert_eq!(EcrHost::of(&host), Some(private));
    }
}
