package relay

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

var errNotStarted = errors.New("not started")

// condition is something that holds or fails, such as the way to the broker. It
// logs a line when that changes or the reason does, and now and then while it
// fails, not for each failure.
type condition struct {
	what string
	log  *slog.Logger

	mu    sync.Mutex
	err   error
	since time.Time // of the first failure in a row
	said  time.Time // when a failure was logged last
	text  string    // what was said then
}

// failsFor returns how long it has failed, 0 if it holds.
func (c *condition) failsFor() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil || c.since.IsZero() {
		return 0
	}
	return time.Since(c.since)
}

func (c *condition) set(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.err
	c.err = err
	began := err != nil && (before == nil || before == errNotStarted)
	if began {
		c.since = time.Now()
	}
	switch {
	case began:
		c.said, c.text = time.Now(), err.Error()
		c.log.Warn("relay: "+c.what+" fails; trying again until it works", "error", err)
	case err != nil && (time.Since(c.said) > remindEvery || err.Error() != c.text && time.Since(c.said) > reasonEvery):
		c.said, c.text = time.Now(), err.Error()
		c.log.Warn("relay: "+c.what+" still fails", "error", err, "since", c.since)
	case err == nil && before != nil:
		c.log.Info("relay: " + c.what + " works")
	}
}

const (
	reasonEvery = 5 * time.Second // bounds the lines of a failure whose reason changes
	remindEvery = time.Minute     // of one that goes on
)

func (c *condition) get() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", c.what, c.err)
}

type counts struct {
	published, refused, unknown atomic.Int64
}

// Stats is a snapshot of a relay, without a look at the database. Counters begin
// with the process.
type Stats struct {
	Published int64 // messages confirmed by the broker and not returned
	Refused   int64 // verdicts by which a message was parked, other than for an earlier one of its key
	Unknown   int64 // publishes whose answer was lost; each was repeated
	LeaseLost int64 // leases that ended before they were renewed
	Lanes     int   // owned now, of 64
	InHand    int   // messages read and not settled
	InFlight  int   // of those, published and not answered
}

// Stats returns the relay's counters.
func (r *Relay) Stats() Stats {
	owned := 0
	for _, epoch := range r.leases.owned() {
		if epoch != 0 {
			owned++
		}
	}
	r.hand.mu.Lock()
	inHand := len(r.hand.byID) - len(r.hand.gone)
	inFlight := r.hand.inFlight
	r.hand.mu.Unlock()
	return Stats{
		Published: r.counts.published.Load(),
		Refused:   r.counts.refused.Load(),
		Unknown:   r.counts.unknown.Load(),
		LeaseLost: r.leases.lost.Load(),
		Lanes:     owned,
		InHand:    inHand,
		InFlight:  inFlight,
	}
}

// Ready returns nil while the relay can do its work, and otherwise everything
// that keeps it from it.
func (r *Relay) Ready() error {
	return errors.Join(r.schema.get(), r.leasing.get(), r.reading.get(), r.settling.get(), r.broker.get(), r.alarm.get())
}
