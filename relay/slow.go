package relay

import (
	"sync"
	"sync/atomic"
	"time"
)

// slow is the destinations that answer, but late: what is in flight for one of them is
// no sign that it is silent, nor that another is.
type slow struct {
	count atomic.Int64 // so that what is answered soon need not lock

	mu            sync.Mutex
	byDestination map[destination]slowness
}

// slowness is how long the slowest answer of a destination took, and when the last slow
// one came.
type slowness struct {
	took time.Duration
	at   int64 // by our monotonic clock
}

const (
	// slowFor is how long after its last slow answer a destination counts as slow.
	slowFor = time.Minute
	// maxPatience bounds what a slow destination may take among others, whose messages it
	// holds up meanwhile: a slower one is taken for silent, and has that time as a suspect.
	maxPatience = 4 * time.Second
	// maxSlow bounds the destinations that are remembered.
	maxSlow = 1000
)

func newSlow() *slow { return &slow{byDestination: make(map[destination]slowness)} }

// patience is how long a destination may take, if it is slow: twice as long as it did, up to
// maxPatience.
func (s *slow) patience(d destination) time.Duration {
	if s.count.Load() == 0 {
		return 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	known, ok := s.byDestination[d]
	if ok && since()-known.at > int64(slowFor) {
		s.forget(d)
	}
	return min(2*s.byDestination[d].took, maxPatience)
}

// answered notes how long an answer took, if that was long.
func (s *slow) answered(d destination, took time.Duration) {
	if took < silentAfter {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	known := s.byDestination[d]
	for old := range s.byDestination { // any: it will be found out again
		if known.at != 0 || len(s.byDestination) < maxSlow {
			break
		}
		s.forget(old)
	}
	s.byDestination[d] = slowness{max(took, known.took), since()}
	s.count.Store(int64(len(s.byDestination)))
}

// forget takes a destination for one that answers at once. The caller holds mu.
func (s *slow) forget(d destination) {
	delete(s.byDestination, d)
	s.count.Store(int64(len(s.byDestination)))
}
