package relay_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/txbox/txbox/internal/servers/serverstest"
	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/outbox"
	"github.com/txbox/txbox/relay"
)

// One queue answers after some seconds, others at once. Once that is known its messages
// are waited for: they neither come again and again nor hold up the others'.
func TestQueueThatAnswersSlowlyIsWaitedFor(t *testing.T) {
	t.Parallel()
	broker := serverstest.RabbitMQ(t)
	b := setupAt(t, testenv.DatabaseURL(t), broker.URL())
	slow := testenv.Name(t)
	b.declare(slow)
	_, err := broker.Ctl(testenv.Context(t), "eval", fmt.Sprintf(`
		Queue = '%%2F_%s',
		spawn(fun Loop() -> sys:suspend(Queue), timer:sleep(3000), sys:resume(Queue), timer:sleep(100), Loop() end).`, slow))
	b.must(err)
	var log lockedBuffer
	r, _ := b.start(b.logTo(&log))
	var good, late []outbox.Message
	begun, given, givenAt := time.Now(), 0, time.Now()
	for time.Since(givenAt) < 15*time.Second { // five times as long as an answer takes
		some := b.messages(6, noKey)
		some[0].Exchange = slow
		good, late = append(good, some[1:]...), append(late, some[0])
		b.write(some...)
		b.must(pauseFor(t, 200*time.Millisecond))
		if n := log.lines("broker fails"); n > given {
			given, givenAt = n, time.Now()
		}
		if time.Since(begun) > 90*time.Second {
			t.Fatalf("%d connections were given up, the last %s ago", given, time.Since(givenAt))
		}
	}
	b.checkAll(b.drain(b.queue, len(good)), good, (given+1)*inFlight)
	got := b.drain(slow, len(late))
	b.checkAll(got, late, (given+1)*inFlight)
	b.eventuallyCount("outbox", 0)
	b.eventuallyCount("outbox_parked", 0)
	t.Logf("%d connections given up; %d messages repeated, of the slow queue %d", given, r.Stats().Unknown, len(got)-len(late))
}

// Something on the way lets certain bytes never through, and says nothing. That holds up
// the others of its destination for a while, once; later it is tried apart from them.
func TestMessageThatNeverGetsAnAnswerIsTriedApart(t *testing.T) {
	t.Parallel()
	b := setup(t)
	proxy := newPoisonProxy(t, b.amqpURL, "p0is0n")
	proxy.silent.Store(1000)
	b.amqpURL = proxy.url
	var log lockedBuffer
	r, _ := b.start(b.logTo(&log), func(_ *relay.Config, pub *relay.RabbitMQConfig) { pub.ConfirmTimeout = 5 * time.Second })
	msgs := b.messages(200, noKey)
	msgs[100].Payload = []byte("p0is0n")
	b.write(msgs...)
	msgs = slices.Delete(msgs, 100, 101)
	testenv.Eventually(t, 40*time.Second, "the others get through", func() bool { return r.Stats().Published >= int64(len(msgs)) })
	given, held := log.lines("broker fails"), 0
	for range 30 {
		some := b.messages(10, noKey)
		b.write(some...)
		msgs = append(msgs, some...)
		began := time.Now()
		b.must(pauseFor(t, time.Second))
		testenv.Eventually(t, 20*time.Second, "they get through", func() bool { return r.Stats().Published >= int64(len(msgs)) })
		if time.Since(began) > 3*time.Second { // on a connection that waits for an answer they would for longer
			held++
		}
	}
	b.checkAll(b.drain(b.queue, len(msgs)), msgs, 4*inFlight)
	// If it was the first without an answer it stood trial for its destination, which is
	// refused until another gets through; else it was found by halves.
	if apart, trial := log.lines("a message has no answer"), log.lines("are refused"); apart+trial != 1 {
		t.Errorf("the log says %d times that a message has no answer, %d times that its destination has none", apart, trial)
	}
	if n := log.lines("broker fails"); given > 4 || n > given || held > 0 {
		t.Errorf("%d connections were given up, and %d more; others were held up %d times", given, n-given, held)
	}
	b.eventuallyCount("outbox", 0)
	b.eventuallyCount("outbox_parked", 1)
}

// The message that is to show whether its destination answers ends connections, and there
// is no other destination. The others do not wait for it.
func TestMessageOnTrialThatEndsConnectionsHoldsUpNobody(t *testing.T) {
	t.Parallel()
	b := setup(t)
	proxy := newPoisonProxy(t, b.amqpURL, "p0is0n")
	proxy.silent.Store(1) // that is why it is put on trial
	b.amqpURL = proxy.url
	b.start(brisk)
	msgs := b.messages(200, noKey)
	msgs[0].Payload = []byte("p0is0n")
	b.write(msgs...)
	b.checkAll(b.drain(b.queue, len(msgs)-1), msgs[1:], 4*inFlight)
	b.eventuallyCount("outbox", 0)
	b.eventuallyCount("outbox_parked", 1)
	if found := b.reasons(); found["dead"] != 1 {
		t.Errorf("parked: %v", found)
	}
}
