package relay

import (
	"slices"
	"testing"
	"time"
)

// A message is parked for a suspect at the very moment at which that takes messages
// again: it is read at once all the same.
func TestMessageThatWasJustParkedIsRecalled(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	s.commit("", 1)
	for range 2 { // first from outbox, then from outbox_parked
		s.read()
		taken := s.hand.take(1)
		if len(taken) != 1 {
			t.Fatal("the message was not read")
		}
		s.hand.refuse(verdict{message: taken[0], reason: "retry", delay: suspectDelay - time.Minute, lastError: "silent"})
		s.settle()
		s.suspects.cleared = []recalled{{placeOf(taken[0]), []string{"silent"}, time.Now()}}
	}
	s.read()
	if len(s.hand.take(1)) != 1 {
		t.Error("it waits for its time")
	}
}

// What has been tried since its place takes messages again, and was refused, waits for its
// time like any other.
func TestRecallLeavesWhatWasRefusedSince(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	s.commit("", 1)
	s.read()
	taken := s.hand.take(1)
	s.hand.refuse(verdict{message: taken[0], reason: "retry", spend: 1, delay: time.Minute, lastError: "returned"})
	s.settle()
	s.suspects.cleared = []recalled{{placeOf(taken[0]), []string{"missing"}, time.Now()}}
	s.read()
	if len(s.hand.take(1)) != 0 {
		t.Error("it is tried before its time")
	}
}

// park puts messages for queue "q" into outbox_parked, due in a while.
func (s *steps) park(n int, due time.Duration, why string) {
	s.Helper()
	_, err := s.db.Exec(s.ctx, `INSERT INTO `+s.db.Table("outbox_parked")+` (message_id, routing_key, reason, due_at, last_error)
		SELECT gen_random_uuid(), 'q', 'retry', now() + $2::interval, $3 FROM generate_series(1, $1::int)`, n, due, why)
	s.must(err)
}

// Many messages are recalled: others have their turn after each page. The place is suspect
// again meanwhile, so that what was read is parked again: that goes on until it takes
// messages once more, and not for ever.
func TestRecallLeavesOthersTheirTurnAndEnds(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	const many = lanes*duePerLane + 500
	s.park(many, suspectDelay-time.Minute, "silent")
	m := newMessage(1, "", "q")
	s.suspects.accuse(m, silent, "silent")
	s.suspects.clear(m)
	s.read()
	if n := len(s.hand.byID); n == 0 || n >= many {
		t.Errorf("%d of %d messages were read in one round", n, many)
	}
	s.suspects.accuse(m, silent, "silent again")
	s.read()
	if n := len(s.reader.recall); n != 0 {
		t.Errorf("%d recalls go on while the place is suspect", n)
	}
	s.suspects.clear(m)
	if cleared := s.suspects.takeCleared(); len(cleared) != 1 || !slices.Contains(cleared[0].why, "silent") {
		t.Errorf("it does not recall what was parked before: %v", cleared)
	}
}

// Messages were parked for a suspect by a relay that has been stopped, for minutes. The
// next relay does not know it as suspect: when the first of them gets through the others
// follow.
func TestWhatAnotherRelayParkedForASuspectIsRecalled(t *testing.T) {
	t.Parallel()
	for _, why := range []string{notAnswering, `Exception (404) Reason: "NOT_FOUND - no exchange '' in vhost '/'"`} {
		s := newSteps(t)
		s.park(1, 0, why)
		s.park(20, suspectDelay-time.Minute, why)
		s.park(1, suspectDelay-time.Minute, "returned by the broker: 312 NO_ROUTE")
		s.read()
		first := s.hand.take(100)
		if len(first) != 1 {
			t.Fatalf("%d messages are due", len(first))
		}
		s.confirmed(first)
		s.read()
		if n := len(s.hand.take(100)); n != 20 {
			t.Errorf("%s: %d messages follow", why, n)
		}
	}
}

// While a relay or the broker was away nothing was tried: that time makes no message dead.
func TestRetryForIsSpentByAttempts(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	s.settler.retryFor = time.Hour
	for _, c := range []struct {
		attempts int
		reason   string
	}{{1, "retry"}, {40, "retry"}, {70, "dead"}} {
		s.park(1, 0, "returned")
		_, err := s.db.Exec(s.ctx, `UPDATE `+s.db.Table("outbox_parked")+` SET attempts = $1, parked_at = now() - interval '2 hours'`, c.attempts)
		s.must(err)
		s.reader.dueAt = time.Time{}
		s.read()
		for _, m := range s.hand.take(1) {
			s.refuse(m, returned, "returned")
		}
		s.settle()
		var reason string
		s.must(s.db.QueryRow(s.ctx, `DELETE FROM `+s.db.Table("outbox_parked")+` RETURNING reason`).Scan(&reason))
		if reason != c.reason {
			t.Errorf("after two hours and %d attempts: %s", c.attempts, reason)
		}
	}
}
