//! Steps of the server that a test build can kill, delay or make fail from outside; in every other build this is nothing.
//!
//! Compiled in only by the feature `chaos`, which no release has: then `PUT /chaos/failpoints/<name>` with an action as
//! its body arms one, and `GET /chaos/failpoints` lists them. Without the feature [`hit`] is an empty function.

/// A fail point said so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the fail point {0} said so")]
pub struct Injected(pub &'static str);

impl From<Injected> for sqlx::Error {
    fn from(injected: Injected) -> Self {
        Self::Protocol(injected.to_string())
    }
}

/// Passes a step. See the module.
///
/// # Errors
/// The fail point is armed with `error`.
#[cfg(not(feature = "chaos"))]
#[inline(always)]
#[expect(clippy::unused_async, reason = "the other build waits here")]
pub async fn hit(_name: &'static str) -> Result<(), Injected> {
    Ok(())
}

/// Passes a step that cannot wait; true when it is to fail.
#[cfg(not(feature = "chaos"))]
#[inline(always)]
#[must_use]
pub const fn fails(_name: &'static str) -> bool {
    false
}

#[cfg(feature = "chaos")]
pub use armed::{Action, NAMES, NotArmed, arm, fails, hit, states};

#[cfg(feature = "chaos")]
mod armed {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use parking_lot::Mutex;

    use super::Injected;

    /// What an armed fail point does. `once:` before it disarms it after the first time.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Action {
        /// The process ends at once, as by SIGKILL.
        Kill,
        /// The step waits so many milliseconds.
        Sleep(u64),
        /// The step fails.
        Error,
    }

    /// Every fail point: the room, then the step.
    pub const NAMES: [&str; 19] = [
        "election.locked",
        "election.began",
        "election.resigning",
        "relay.claim",
        "relay.claimed",
        "relay.part",
        "relay.appended",
        "relay.partition",
        "relay.announce",
        "feed.heard",
        "feed.reconcile",
        "feed.read",
        "feed.epoch",
        "resume.settle",
        "resume.decided",
        "resume.page",
        "session.send",
        "drain.began",
        "log.trim",
    ];

    /// Armed ones, and whether they disarm themselves.
    static ARMED: Mutex<BTreeMap<&'static str, (Action, bool)>> = Mutex::new(BTreeMap::new());

    /// Passes a step. See the module.
    ///
    /// # Errors
    /// The fail point is armed with `error`.
    pub async fn hit(name: &'static str) -> Result<(), Injected> {
        match pass(name) {
            Some(Action::Sleep(millis)) => {
                tokio::time::sleep(Duration::from_millis(millis)).await;
                Ok(())
            }
            Some(Action::Error) => Err(Injected(name)),
            Some(Action::Kill) | None => Ok(()),
        }
    }

    /// Passes a step that cannot wait: armed with `sleep` it does not. True when it is armed with `error`.
    pub fn fails(name: &'static str) -> bool {
        pass(name) == Some(Action::Error)
    }

    /// What the step is to do; does not return if that is to kill.
    fn pass(name: &'static str) -> Option<Action> {
        debug_assert!(NAMES.contains(&name), "{name} is not listed");
        let action = {
            let mut armed = ARMED.lock();
            let (action, once) = armed.get(name).copied()?;
            if once {
                armed.remove(name);
            }
            action
        };
        tracing::warn!(name, ?action, "fail point");
        if action == Action::Kill {
            std::process::abort();
        }
        Some(action)
    }

    /// Every fail point and what it does now.
    #[must_use]
    pub fn states() -> BTreeMap<&'static str, String> {
        let armed = ARMED.lock();
        let state = |name| armed.get(name).map_or_else(|| "off".to_owned(), |(action, _)| format!("{action:?}"));
        NAMES.into_iter().map(|name| (name, state(name))).collect()
    }

    /// Why a fail point was not armed.
    #[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
    pub enum NotArmed {
        /// There is none of that name.
        #[error("no fail point {0}; there are: {names}", names = NAMES.join(", "))]
        Unknown(String),
        /// The text is no action.
        #[error("an action is off, kill, error or sleep(<milliseconds>), with `once:` before it if need be")]
        BadAction,
    }

    /// Arms a fail point, or disarms it with `off`.
    ///
    /// # Errors
    /// [`NotArmed`].
    pub fn arm(name: &str, action: &str) -> Result<(), NotArmed> {
        let known = NAMES.into_iter().find(|known| *known == name);
        let name = known.ok_or_else(|| NotArmed::Unknown(name.to_owned()))?;
        match parse(action).ok_or(NotArmed::BadAction)? {
            Some(armed) => drop(ARMED.lock().insert(name, armed)),
            None => drop(ARMED.lock().remove(name)),
        }
        Ok(())
    }

    /// None: not an action. `Some(None)`: off.
    fn parse(text: &str) -> Option<Option<(Action, bool)>> {
        let text = text.trim();
        let (once, text) = text.strip_prefix("once:").map_or((false, text), |text| (true, text));
        let action = match text {
            "off" => return Some(None),
            "kill" => Action::Kill,
            "error" => Action::Error,
            text => Action::Sleep(text.strip_prefix("sleep(")?.strip_suffix(')')?.parse().ok()?),
        };
        Some(Some((action, once)))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn what_cannot_be_armed_says_why() {
            assert!(arm("relay.nonsense", "kill").unwrap_err().to_string().contains("relay.claim"));
            assert_eq!(arm("relay.claim", "explode"), Err(NotArmed::BadAction));
        }

        #[test]
        fn actions_are_read() {
            assert_eq!(parse("kill"), Some(Some((Action::Kill, false))));
            assert_eq!(parse("once:sleep(250)"), Some(Some((Action::Sleep(250), true))));
            assert_eq!(parse("off"), Some(None));
            assert_eq!(parse("explode"), None);
        }
    }
}
