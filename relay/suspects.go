package relay

import (
	"sync"
	"sync/atomic"
	"time"
)

// suspects are destinations that would harm others: exchanges that the broker
// said are missing or closed to us, each message to which closes a channel, and
// queues that do not answer. Their messages are parked, and one at a time is tried
// on a connection of its own.
type suspects struct {
	count   atomic.Int64 // so that what is confirmed need not lock
	mu      sync.Mutex
	byPlace map[place]*suspect
}

// place is a destination, or a whole exchange.
type place struct {
	destination
	whole bool
}

func placesOf(m *message) [2]place {
	return [2]place{{destination{exchange: m.exchange}, true}, {m.destination, false}}
}

type suspect struct {
	failures int
	why      string // in the broker's words
	probe    *message
	next     time.Time // of the next probe
}

// maxSuspects bounds the places that are remembered.
const maxSuspects = 1000

// maxProbe bounds the pause between two probes of one place.
const maxProbe = 5 * time.Second

func newSuspects() *suspects { return &suspects{byPlace: make(map[place]*suspect)} }

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
	if m.parked && x.probe == nil && time.Now().After(x.next) {
		x.probe, m.alone = m, true
	}
	return false
}

// accuse makes p a suspect because of m, or counts the failure of its probe.
func (s *suspects) accuse(p place, m *message, why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.byPlace[p]
	if x == nil {
		for old := range s.byPlace { // any: it will be found out again
			if len(s.byPlace) < maxSuspects {
				break
			}
			delete(s.byPlace, old)
		}
		x = &suspect{}
		s.byPlace[p] = x
		s.count.Store(int64(len(s.byPlace)))
	}
	x.why = why
	if x.probe == m {
		x.failures++
		x.probe = nil
		x.next = time.Now().Add(min(backOff(x.failures), maxProbe))
	}
}

// reason returns how often probes of the suspect to which m goes have failed, and
// why it is one.
func (s *suspects) reason(m *message) (failures int, why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if x := s.of(m); x != nil {
		return x.failures, x.why
	}
	return 0, "" // cleared meanwhile
}

// forget ends the probe that m was, without a result.
func (s *suspects) forget(m *message) {
	if s.count.Load() == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range placesOf(m) {
		if x := s.byPlace[p]; x != nil && x.probe == m {
			x.probe = nil
		}
	}
}

// clear records that the broker took or returned m: its exchange is there, and its
// destination answers.
func (s *suspects) clear(m *message) {
	if s.count.Load() == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range placesOf(m) {
		delete(s.byPlace, p)
	}
	s.count.Store(int64(len(s.byPlace)))
}
