package relay

import (
	"testing"
	"time"
)

// How long a message may be without an answer depends on what is known of the others.
func TestPatienceWithTheBroker(t *testing.T) {
	t.Parallel()
	const confirmTimeout, alerted = defaultConfirmTimeout, silentAfter + doubtFor
	for _, c := range []struct {
		name             string
		prober           bool
		patience, slowly time.Duration // of the message; what an answer of its destination took
		stalled          time.Duration // so long ago a connection was given up; 0: never
		want             time.Duration
	}{
		{"nothing is known", false, 0, 0, 0, confirmTimeout},
		{"a connection was given up", false, 0, 0, time.Second, alerted},
		{"a while ago", false, 0, 0, alertFor + time.Second, confirmTimeout},
		{"its destination is slow", false, 0, 1600 * time.Millisecond, time.Second, 3200*time.Millisecond + doubtFor},
		{"and slower", false, 0, 20 * time.Second, time.Second, maxPatience + doubtFor},
		{"it probes", true, silentAfter, 0, time.Second, silentAfter},
		{"it probes what is slow", true, silentAfter, 1600 * time.Millisecond, time.Second, 3200 * time.Millisecond},
		{"it probes for long", true, time.Hour, 0, time.Second, confirmTimeout},
	} {
		r := &Relay{pub: &rabbitMQ{cfg: RabbitMQConfig{ConfirmTimeout: confirmTimeout}}, slow: newSlow()}
		m := newMessage(1, "", "q")
		m.patience = c.patience
		if c.stalled > 0 {
			r.stalledAt.Store(since() - int64(c.stalled))
		}
		r.slow.answered(m.destination, c.slowly)
		ch := &channel{session: &session{relay: r}, prober: c.prober}
		if got := ch.limit(flight{message: m}); got != c.want {
			t.Errorf("%s: %s, not %s", c.name, got, c.want)
		}
	}
}
