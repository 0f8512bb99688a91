package relay

import (
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Messages for a suspect are parked the longer the more there are, lest reading them
// again and again cost others their time. When it takes messages again they are read
// before they are due.
const (
	suspectStep  = 50 * time.Millisecond
	suspectDelay = 5 * time.Minute
)

// suspects are destinations that would harm others: exchanges that the broker
// said are missing or closed to us, each message to which closes a channel, and
// queues that do not answer. Their messages are parked, and one at a time is tried
// on a connection of its own. So is a single message that had no answer so: others for
// its destination may have one.
type suspects struct {
	count   atomic.Int64 // so that what is confirmed need not lock
	mu      sync.Mutex
	byPlace map[place]*suspect
	cleared []recalled          // of which messages are parked, perhaps
	asked   map[place]time.Time // when they were last recalled on the word of one of them
}

// place is a destination, a whole exchange, or a single message.
type place struct {
	destination
	whole bool
	only  int64 // the id of the message; 0: all
}

func placeOf(m *message) place { return place{destination: m.destination} }

func exchangeOf(m *message) place {
	return place{destination: destination{exchange: m.exchange}, whole: true}
}

func itself(m *message) place { return place{destination: m.destination, only: m.id} }

// placesOf returns the places that m may tell of, the widest first.
func placesOf(m *message) [3]place { return [...]place{exchangeOf(m), placeOf(m), itself(m)} }

// recalled is a place that was cleared, and what was said of it: what was parked for that
// is read before its time. Not so what has been tried since, and was refused.
type recalled struct {
	place
	why []string
	at  time.Time
}

type suspect struct {
	failures int
	why      []string // in the broker's words, the latest last
	probe    *message
	next     time.Time // of the next probe
	chosenAt time.Time // when a message was last chosen to be it
	waits    int       // verdicts without a try
}

// says notes why a place is suspect. What is parked for it bears that.
func (x *suspect) says(why string) {
	x.why = append(slices.DeleteFunc(x.why, func(w string) bool { return w == why }), why)
	x.why = x.why[max(0, len(x.why)-maxReasons):]
}

func (x *suspect) latest() string { return x.why[len(x.why)-1] }

// notAnswering is why a destination is suspect that is silent.
const notAnswering = "its destination does not answer"

// maxReasons bounds the reasons that are remembered of a place.
const maxReasons = 4

// maxSuspects bounds the places that are remembered.
const maxSuspects = 1000

const (
	// maxProbe bounds the pause between two probes of one place.
	maxProbe = 5 * time.Second
	// othersFirst is by how much later than any other message one is tried again that
	// has failed as the probe: the fault may be its own.
	othersFirst = 2 * dueEvery
)

func newSuspects() *suspects {
	return &suspects{byPlace: make(map[place]*suspect), asked: make(map[place]time.Time)}
}

// of returns the suspect to which m goes, or nil. The caller holds mu.
func (s *suspects) of(m *message) *suspect {
	for _, p := range placesOf(m) {
		if x := s.byPlace[p]; x != nil {
			return x
		}
	}
	return nil
}

// admit says whether m may go out among others. If not, and no other message
// probes its suspect, m becomes the probe: alone is set.
func (s *suspects) admit(m *message) bool {
	if s.count.Load() == 0 {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.of(m)
	if x == nil {
		return true
	}
	if now := time.Now(); m.parked && x.probe == nil && now.After(x.next) {
		x.probe, x.chosenAt = m, now
		m.alone, m.patience = true, 0
		if !isException(x.latest()) { // to which the answer comes at once
			m.patience = silentAfter << min(x.failures, 10)
		}
	}
	return false
}

// accuse makes a place a suspect because of what m met there, or counts the failure of
// its probe. It returns when m is to be tried again, and whether the fault is its own,
// since others for its destination are answered.
func (s *suspects) accuse(m *message, why cause, text string) (delay time.Duration, own bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := placeOf(m)
	if why == missing {
		p = exchangeOf(m)
	} else if x := s.byPlace[itself(m)]; x != nil && x.probe == m || why == unanswered {
		p, own = itself(m), true
	}
	for _, other := range placesOf(m) {
		if x := s.byPlace[other]; other != p && x != nil && x.probe == m { // that told nothing of it
			x.probe, x.next = nil, time.Now().Add(min(backOff(x.failures), maxProbe))
		}
	}
	x := s.add(p)
	x.says(text)
	if x.probe != m && why != silent && why != unanswered { // it was among others
		return backOff(0), own
	}
	if x.probe == m {
		x.failures++
		x.probe, x.chosenAt = nil, time.Now()
	}
	delay = backOff(x.failures)
	if !own {
		delay = min(delay, maxProbe)
	}
	if x.probe == nil {
		x.next = time.Now().Add(delay)
	}
	if why == silent {
		s.add(itself(m)).says(text)
	}
	return delay + othersFirst, own
}

// add returns what is known of a place that is suspect from now on. The caller holds mu.
func (s *suspects) add(p place) *suspect {
	x := s.byPlace[p]
	if x == nil {
		s.makeRoom()
		x = &suspect{}
		s.byPlace[p] = x
		s.count.Store(int64(len(s.byPlace)))
	}
	return x
}

// makeRoom forgets a place if there are too many, a single message if there is one: it
// will be found out again.
func (s *suspects) makeRoom() {
	if len(s.byPlace) < maxSuspects {
		return
	}
	var any place
	for any = range s.byPlace {
		if any.only != 0 {
			break
		}
	}
	delete(s.byPlace, any)
}

// wait returns when m, which was not tried, is to be read again, and why the place to
// which it goes is suspect. If nothing has been chosen as a probe for a while, m is.
func (s *suspects) wait(m *message) (delay time.Duration, why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.of(m)
	if x == nil {
		return backOff(0), "" // cleared meanwhile
	}
	x.waits++
	if time.Since(x.chosenAt) > 2*maxProbe {
		x.chosenAt = time.Now()
		return backOff(0), x.latest()
	}
	return rand.N(min(maxProbe+time.Duration(x.waits)*suspectStep, suspectDelay)), x.latest()
}

// forget ends the probes that messages were, without a result.
func (s *suspects) forget(ms ...*message) {
	if s.count.Load() == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range ms {
		for _, p := range placesOf(m) {
			if x := s.byPlace[p]; x != nil && x.probe == m {
				x.probe = nil
			}
		}
	}
}

// clear records that the broker took or returned m: its exchange is there, and its
// destination answers. It returns whether that was thought not to.
func (s *suspects) clear(m *message) (silent bool) {
	if s.count.Load() == 0 && m.parkedFor == "" {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if p, ok := suspectedOf(m); ok && s.byPlace[p] == nil && time.Since(s.asked[p]) > askEvery {
		// By a relay that has been stopped, or has had its lane.
		s.recall(p, []string{m.parkedFor})
	}
	for _, p := range placesOf(m) {
		if x := s.byPlace[p]; x != nil {
			delete(s.byPlace, p)
			if p.only == 0 {
				silent = silent || x.latest() == notAnswering
				s.recall(p, x.why)
			}
		}
	}
	s.count.Store(int64(len(s.byPlace)))
	return silent
}

// recall has what was parked for a place read before its time. The caller holds mu.
func (s *suspects) recall(p place, why []string) {
	if len(s.asked) >= maxSuspects {
		clear(s.asked)
	}
	now := time.Now()
	s.asked[p] = now
	s.cleared = append(s.cleared, recalled{p, why, now})
}

// takeCleared returns the places that were cleared since.
func (s *suspects) takeCleared() []recalled {
	s.mu.Lock()
	defer s.mu.Unlock()
	cleared := s.cleared
	s.cleared = nil
	return cleared
}

// askEvery is how often messages parked for a place are recalled on the word of one of them.
const askEvery = 5 * time.Second

// suspectedOf returns the place for which m was parked, by the words it bears, if that was
// suspect.
func suspectedOf(m *message) (p place, ok bool) {
	switch {
	case m.parkedFor == notAnswering:
		return placeOf(m), true
	case isException(m.parkedFor) && strings.Contains(m.parkedFor, "topic '"):
		return placeOf(m), true
	case isException(m.parkedFor):
		return exchangeOf(m), true
	}
	return place{}, false
}

// isException says that why a place is suspect is the broker's answer to what was published.
func isException(why string) bool { return strings.HasPrefix(why, "Exception (") }

// again says that a place is suspect again, which then bears what was said of it before:
// whoever takes messages of it again will be asked for all that was parked for it.
func (s *suspects) again(r recalled) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.byPlace[r.place]
	if x != nil {
		latest := x.latest()
		for _, why := range r.why {
			x.says(why)
		}
		x.says(latest)
	}
	return x != nil
}
