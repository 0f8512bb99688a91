package relay

import (
	"math/rand/v2"
	"strings"
	"time"
)

// cause says why the broker does not have a message.
type cause int

const (
	returned   cause = iota + 1 // no queue is bound for it
	nacked                      // a queue refused it
	failed                      // something at the broker failed while it was published
	missing                     // its exchange does not exist, or we may not write to it
	denied                      // we may not write to its topic
	silent                      // it was a probe, and had no answer
	unanswered                  // it was published apart, since others were kept waiting, and had none
	suspected                   // it was not tried, since its destination is suspect
	impossible                  // it can never be published
)

// maxBackOff bounds the pause between two attempts of one message.
const maxBackOff = time.Minute

// backOff is exponential with full jitter, from 1 s.
func backOff(failures int) time.Duration {
	limit := maxBackOff
	if failures < 6 {
		limit = min(limit, time.Second<<failures)
	}
	return rand.N(limit) + 10*time.Millisecond
}

// confirmed: the broker has the messages.
func (r *Relay) confirmed(ms []*message) {
	for _, m := range ms {
		if r.suspects.clear(m) {
			r.stalledAt.Store(since()) // it may be silent again at once
		}
		r.refusals.accepted(m)
	}
	r.counts.published.Add(int64(len(ms)))
	r.hand.confirm(ms)
}

// refuse: the broker will not have it now, or ever. A message whose exchange is
// missing spends an attempt only when it was published alone, as the probe. What was not tried spends none, nor does
// what goes to a destination that does not answer.
func (r *Relay) refuse(m *message, why cause, text string) {
	ownFault := false
	v := verdict{message: m, reason: "retry", spend: 1, lastError: clip(text)}
	switch why {
	case impossible:
		v.reason = "dead"
		r.suspects.forget(m)
	case missing, denied, silent, unanswered:
		if !m.alone || why == silent || why == unanswered {
			v.spend = 0
		}
		if v.delay, ownFault = r.suspects.accuse(m, why, v.lastError); ownFault {
			v.lastError = "it has no answer, though others for its destination have one"
		}
		if why == unanswered {
			r.refusals.unanswered(m)
		}
	case suspected:
		v.spend = 0
		v.delay, v.lastError = r.suspects.wait(m)
	default:
		r.suspects.clear(m)
	}
	if v.delay == 0 {
		v.delay = backOff(m.attempts)
	}
	m.alone = false
	if !ownFault {
		r.refusals.refused(m, v.reason, v.lastError)
	}
	r.counts.refused.Add(1)
	r.hand.refuse(v)
}

// unknown: the connection or channel ended before the answer. No attempt is
// spent; the message is published again.
func (r *Relay) unknown(m *message) {
	r.counts.unknown.Add(1)
	r.hand.retry(m)
}

// clip makes the broker's words fit for the table.
func clip(text string) string {
	text = strings.ToValidUTF8(strings.ReplaceAll(text, "\x00", ""), "?")
	const limit = 1000
	if len(text) > limit {
		text = strings.ToValidUTF8(text[:limit], "")
	}
	return text
}
