//! The rules by which operations fail, and the engine that follows them.
//!
//! ```text
//!   event ──► rules of this event whose state is the present one
//!                │ set-state: the first of them names the next state
//!                │ inject-error: if there are any, these are armed, in place of those before
//!                ▼
//!   operation ──► the first armed rule for its kind and its sectors ──► fails, unless errno is 0
//! ```
//!
//! So a rule that is armed stays so until an event arms others, and fails operations of other kinds,
//! too: its event says when it begins, and `iotype` what it is about. The event `none` happens once,
//! at the very beginning. A rule that is to fire once is gone after it has.

/// Bytes of a sector, as rules count them.
const SECTOR: u64 = 512;

macro_rules! events {
    ($($event:ident $name:literal,)*) => {
        /// What happens to an image, by QEMU's names.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs)]
        pub enum Event {
            $($event,)*
        }

        impl Event {
            /// Each, under its name.
            pub const ALL: &[(&str, Self)] = &[$(($name, Self::$event),)*];
            /// The names.
            pub const NAMES: &[&str] = &[$($name,)*];
        }
    };
}

events! {
    L1Update "l1_update",
    L1GrowAllocTable "l1_grow_alloc_table",
    L1GrowWriteTable "l1_grow_write_table",
    L1GrowActivateTable "l1_grow_activate_table",
    L2Load "l2_load",
    L2Update "l2_update",
    L2UpdateCompressed "l2_update_compressed",
    L2AllocCowRead "l2_alloc_cow_read",
    L2AllocWrite "l2_alloc_write",
    ReadAio "read_aio",
    ReadBackingAio "read_backing_aio",
    ReadCompressed "read_compressed",
    WriteAio "write_aio",
    WriteCompressed "write_compressed",
    VmstateLoad "vmstate_load",
    VmstateSave "vmstate_save",
    CowRead "cow_read",
    CowWrite "cow_write",
    ReftableLoad "reftable_load",
    ReftableGrow "reftable_grow",
    ReftableUpdate "reftable_update",
    RefblockLoad "refblock_load",
    RefblockUpdate "refblock_update",
    RefblockUpdatePart "refblock_update_part",
    RefblockAlloc "refblock_alloc",
    RefblockAllocHookup "refblock_alloc_hookup",
    RefblockAllocWrite "refblock_alloc_write",
    RefblockAllocWriteBlocks "refblock_alloc_write_blocks",
    RefblockAllocWriteTable "refblock_alloc_write_table",
    RefblockAllocSwitchTable "refblock_alloc_switch_table",
    ClusterAlloc "cluster_alloc",
    ClusterAllocBytes "cluster_alloc_bytes",
    ClusterFree "cluster_free",
    FlushToOs "flush_to_os",
    FlushToDisk "flush_to_disk",
    PwritevRmwHead "pwritev_rmw_head",
    PwritevRmwAfterHead "pwritev_rmw_after_head",
    PwritevRmwTail "pwritev_rmw_tail",
    PwritevRmwAfterTail "pwritev_rmw_after_tail",
    Pwritev "pwritev",
    PwritevZero "pwritev_zero",
    PwritevDone "pwritev_done",
    EmptyImagePrepare "empty_image_prepare",
    L1ShrinkWriteTable "l1_shrink_write_table",
    L1ShrinkFreeL2Clusters "l1_shrink_free_l2_clusters",
    CorWrite "cor_write",
    ClusterAllocSpace "cluster_alloc_space",
    None "none",
}

impl Event {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        let mut all = Self::ALL.iter();
        all.find(|(_, event)| *event == self)
            .map_or("", |(name, _)| name)
    }
}

/// Kinds of operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoType {
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Making a range zeros.
    WriteZeroes,
    /// Giving a range back.
    Discard,
    /// Making stable what was written.
    Flush,
    /// Asking where data is.
    BlockStatus,
}

impl IoType {
    /// Each, under its name.
    pub const ALL: &[(&str, Self)] = &[
        ("read", Self::Read),
        ("write", Self::Write),
        ("write-zeroes", Self::WriteZeroes),
        ("discard", Self::Discard),
        ("flush", Self::Flush),
        ("block-status", Self::BlockStatus),
    ];
    /// The names.
    pub const NAMES: &[&str] = &[
        "read",
        "write",
        "write-zeroes",
        "discard",
        "flush",
        "block-status",
    ];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        let mut all = Self::ALL.iter();
        all.find(|(_, kind)| *kind == self)
            .map_or("", |(name, _)| name)
    }
}

/// A rule that makes operations fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InjectError {
    /// What arms it.
    pub event: Event,
    /// The state in which the event arms it; any if that is not said.
    pub state: Option<u32>,
    /// The kind of operations that fail; without it all but [`IoType::BlockStatus`].
    pub iotype: Option<IoType>,
    /// The error number; 0: operations that it is for succeed, whatever rules follow.
    pub errno: u16,
    /// Only operations that touch this sector fail.
    pub sector: Option<u64>,
    /// It is gone when it has fired.
    pub once: bool,
    /// The operation fails before it has been started.
    pub immediately: bool,
}

/// A rule that changes the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetState {
    /// What it happens at.
    pub event: Event,
    /// The state in which it happens; any if that is not said.
    pub state: Option<u32>,
    /// The next state.
    pub new_state: u32,
}

/// All rules, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Which operations fail.
    pub inject: Vec<InjectError>,
    /// Which events change the state.
    pub set_state: Vec<SetState>,
}

impl Rules {
    /// These, and then `others`.
    #[must_use]
    pub fn before(mut self, others: Self) -> Self {
        self.inject.extend(others.inject);
        self.set_state.extend(others.set_state);
        self
    }
}

/// An error that an operation is to end with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Injected {
    /// Its number.
    pub errno: i32,
    /// Before the operation has been started.
    pub immediately: bool,
}

/// What follows the rules.
#[derive(Debug)]
pub struct Engine {
    /// `None`: it has fired and is gone.
    inject: Vec<Option<InjectError>>,
    set_state: Vec<SetState>,
    state: u32,
    /// Places of the rules that are armed.
    armed: Vec<usize>,
}

impl Engine {
    /// In state 1, after the event `none`.
    #[must_use]
    pub fn new(rules: &Rules) -> Self {
        let mut engine = Self {
            inject: rules.inject.iter().copied().map(Some).collect(),
            set_state: rules.set_state.clone(),
            state: 1,
            armed: Vec::new(),
        };
        engine.happen(Event::None);
        engine
    }

    /// Something happens.
    pub fn happen(&mut self, event: Event) {
        let is_now = |of: Event, state: Option<u32>| {
            of == event && state.is_none_or(|state| state == self.state)
        };
        let rules = self.inject.iter().enumerate();
        let met = rules.filter(|(_, rule)| rule.is_some_and(|rule| is_now(rule.event, rule.state)));
        let met: Vec<usize> = met.map(|(place, _)| place).collect();
        let mut next = self.set_state.iter();
        let next = next.find(|rule| is_now(rule.event, rule.state));
        let next = next.map(|rule| rule.new_state);
        if !met.is_empty() {
            self.armed = met;
        }
        self.state = next.unwrap_or(self.state);
    }

    /// Whether an operation on `[offset, offset + len)` fails.
    pub fn check(&mut self, kind: IoType, offset: u64, len: u64) -> Option<Injected> {
        let touches = |sector: u64| {
            let at = sector.checked_mul(SECTOR);
            at.is_some_and(|at| at >= offset && at - offset < len)
        };
        let is_for = |rule: &InjectError| {
            rule.sector.is_none_or(touches)
                && match rule.iotype {
                    Some(iotype) => iotype == kind,
                    None => kind != IoType::BlockStatus,
                }
        };
        let armed = self.armed.iter().enumerate();
        let (index, place, rule) = armed
            .filter_map(|(index, &place)| Some((index, place, (*self.inject.get(place)?)?)))
            .find(|(_, _, rule)| is_for(rule))?;
        if rule.errno == 0 {
            return None;
        }
        if rule.once {
            self.armed.remove(index);
            if let Some(gone) = self.inject.get_mut(place) {
                *gone = None;
            }
        }
        Some(Injected {
            errno: rule.errno.into(),
            immediately: rule.immediately,
        })
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a rule that fires at another event, in another state, for another kind or
    //! sector than it says, more than once or never; a state that changes too early; rules that are
    //! taken in another order. The model has the rules as lists of what is left, and no places.

    use proptest::prelude::*;

    use super::*;

    const EVENTS: [Event; 3] = [Event::None, Event::ReadAio, Event::WriteAio];

    /// The rules as their documentation has them.
    struct Model {
        rules: Vec<InjectError>,
        armed: Vec<InjectError>,
        set_state: Vec<SetState>,
        state: u32,
    }

    impl Model {
        fn new(rules: &Rules) -> Self {
            let mut model = Self {
                rules: numbered(&rules.inject),
                armed: Vec::new(),
                set_state: rules.set_state.clone(),
                state: 1,
            };
            model.happen(Event::None);
            model
        }

        fn happen(&mut self, event: Event) {
            let mut armed = Vec::new();
            for rule in &self.rules {
                if rule.event == event && (rule.state.is_none() || rule.state == Some(self.state)) {
                    armed.push(*rule);
                }
            }
            if !armed.is_empty() {
                self.armed = armed;
            }
            for rule in &self.set_state {
                if rule.event == event && (rule.state.is_none() || rule.state == Some(self.state)) {
                    self.state = rule.new_state;
                    break;
                }
            }
        }

        fn check(&mut self, kind: IoType, offset: u64, len: u64) -> Option<i32> {
            for rule in self.armed.clone() {
                let sectors: Vec<u64> = (0..64)
                    .filter(|at| offset <= at * 512 && at * 512 < offset + len)
                    .collect();
                let here = rule.sector.is_none_or(|sector| sectors.contains(&sector));
                let mine = match rule.iotype {
                    Some(iotype) => kind == iotype,
                    None => kind != IoType::BlockStatus,
                };
                if !here || !mine {
                    continue;
                }
                // The number tells which rule it is; see `numbered`.
                if rule.errno % 2 == 1 {
                    return None;
                }
                if rule.once {
                    self.rules.retain(|other| *other != rule);
                    self.armed.retain(|other| *other != rule);
                }
                return Some(rule.errno.into());
            }
            None
        }
    }

    /// Each rule with an error number of its own: odd where operations succeed.
    fn numbered(rules: &[InjectError]) -> Vec<InjectError> {
        let number = |(at, rule): (usize, &InjectError)| InjectError {
            errno: 2 * (at as u16 + 1) + u16::from(rule.errno == 0),
            ..*rule
        };
        rules.iter().enumerate().map(number).collect()
    }

    fn rules() -> impl Strategy<Value = Rules> {
        let event = || prop::sample::select(EVENTS.to_vec());
        let state = || prop::option::of(1..4_u32);
        let kinds: Vec<_> = IoType::ALL.iter().map(|(_, kind)| *kind).collect();
        let inject = (
            event(),
            state(),
            prop::option::of(prop::sample::select(kinds)),
            prop::sample::select(vec![0, 5_u16, 5, 5]),
            prop::option::of(0..8_u64),
            any::<bool>(),
            any::<bool>(),
        );
        let inject = inject.prop_map(|(event, state, iotype, errno, sector, once, immediately)| {
            InjectError {
                event,
                state,
                iotype,
                errno,
                sector,
                once,
                immediately,
            }
        });
        let set = (event(), state(), 1..4_u32).prop_map(|(event, state, new_state)| SetState {
            event,
            state,
            new_state,
        });
        (
            prop::collection::vec(inject, 0..6),
            prop::collection::vec(set, 0..4),
        )
            .prop_map(|(inject, set_state)| Rules { inject, set_state })
    }

    proptest! {
        #[test]
        fn as_the_model_has_it(
            rules in rules(),
            steps in prop::collection::vec(
                (prop::sample::select(EVENTS.to_vec()), any::<bool>(), 0..6_usize, 0..8_u64, 0..4_u64),
                1..60,
            ),
        ) {
            // The engine fires a rule by its errno; the model's have the same but for those of 0.
            let named = numbered(&rules.inject);
            let given = Rules {
                inject: named.iter().map(|rule| match rule.errno % 2 {
                    1 => InjectError { errno: 0, ..*rule },
                    _ => *rule,
                }).collect(),
                set_state: rules.set_state.clone(),
            };
            let (mut engine, mut model) = (Engine::new(&given), Model::new(&rules));
            for (event, happens, kind, sector, sectors) in steps {
                if happens {
                    engine.happen(event);
                    model.happen(event);
                }
                let kind = IoType::ALL[kind].1;
                let (offset, len) = match kind {
                    IoType::Flush => (0, 0),
                    _ => (sector * 512 - sector.min(1), sectors * 512),
                };
                let injected = engine.check(kind, offset, len);
                prop_assert_eq!(
                    injected.map(|injected| injected.errno),
                    model.check(kind, offset, len)
                );
                prop_assert_eq!(engine.state, model.state);
            }
        }
    }

    #[test]
    fn every_event_has_a_name_of_its_own() {
        let kinds: Vec<_> = IoType::ALL.iter().map(|(name, _)| *name).collect();
        assert_eq!(kinds, IoType::NAMES);
        for (at, (name, event)) in Event::ALL.iter().enumerate() {
            let same = |other: &&(&str, Event)| other.0 == *name || other.1 == *event;
            assert_eq!(Event::ALL.iter().filter(same).count(), 1, "{at}: {name}");
        }
    }
}
